package uroot

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/u-root/u-root/pkg/cpio"
)

// readBack parses an archive and returns names (without their padding) to
// records, and the offset of each record's data.
func readBack(t *testing.T, archive []byte) (map[string]cpio.Record, []string) {
	t.Helper()
	rs, err := readRecords(bytes.NewReader(archive))
	if err != nil {
		t.Fatal(err)
	}
	byName := map[string]cpio.Record{}
	var order []string
	for _, r := range rs {
		r.Name = strings.TrimRight(r.Name, "\x00")
		if r.Name != "." {
			byName[r.Name] = r
			order = append(order, r.Name)
		}
	}
	return byName, order
}

func contents(t *testing.T, r cpio.Record) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(r.ReaderAt, 0, int64(r.FileSize)))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestArchiveAligns writes files whose position needs every amount of padding
// and checks that large ones start at page boundaries.
func TestArchiveAligns(t *testing.T) {
	var rs []cpio.Record
	want := map[string][]byte{}
	for i := range 600 {
		name := "f" + strings.Repeat("x", i%97) + string(rune('a'+i%26)) + "/" + strings.Repeat("n", 1+i/97)
		size := pageSize + i
		if i%3 == 0 {
			size = 13 * i
		}
		data := bytes.Repeat([]byte{byte(i) | 1}, size)
		if _, dup := want[name]; dup {
			continue
		}
		want[name] = data
		rs = append(rs, cpio.StaticFile(name, string(data), 0o644))
	}
	var out bytes.Buffer
	n, err := writeArchive(&out, rs)
	if err != nil {
		t.Fatal(err)
	}
	if n != int64(out.Len()) {
		t.Errorf("says %d bytes, wrote %d", n, out.Len())
	}
	got, _ := readBack(t, out.Bytes())
	if len(got) != len(want) {
		t.Fatalf("%d files, want %d", len(got), len(want))
	}
	for name, data := range want {
		if !bytes.Equal(contents(t, got[name]), data) {
			t.Fatalf("%s differs", name)
		}
		if len(data) < pageSize {
			continue
		}
		if at := bytes.Index(out.Bytes(), data); at%pageSize != 0 {
			t.Fatalf("%s: data at %#x", name, at)
		}
	}
}

func TestNameLen(t *testing.T) {
	for pos := int64(0); pos < 3*pageSize; pos += 4 {
		n := nameLen(pos, "bbin/bb")
		if (pos+newcHeader+int64(n))%pageSize != 0 || n < len("bbin/bb")+1 {
			t.Fatalf("pos %d: name of %d bytes", pos, n)
		}
	}
}

func TestMerge(t *testing.T) {
	base := []cpio.Record{
		cpio.Directory("etc", 0o755), cpio.StaticFile("etc/resolv.conf", "old", 0o644),
		cpio.StaticFile("init", "theirs", 0o755), cpio.TrailerRecord,
	}
	own := []cpio.Record{
		cpio.StaticFile("init", "ours", 0o755), cpio.StaticFile("lib/modules/6/x.ko", "m", 0o644),
		cpio.Symlink("sbin/reboot", "/init"), cpio.Directory("lib", 0o700),
	}
	var out bytes.Buffer
	if _, err := writeArchive(&out, merge(base, own)); err != nil {
		t.Fatal(err)
	}
	got, order := readBack(t, out.Bytes())
	if s := contents(t, got["init"]); string(s) != "ours" {
		t.Errorf("init is %q", s)
	}
	want := []string{"etc", "etc/resolv.conf", "init", "lib", "lib/modules", "lib/modules/6", "lib/modules/6/x.ko", "sbin", "sbin/reboot"}
	if !slices.Equal(order, want) {
		t.Errorf("order %q, want %q", order, want)
	}
}

func TestModuleIndexes(t *testing.T) {
	mods := []packedModule{
		{name: "ring", file: "kernel/ring.ko"},
		{name: "virtio", file: "kernel/virtio.ko", depends: []string{"ring"}},
		{name: "pci", file: "kernel/pci.ko", depends: []string{"virtio", "ring", "builtin"}, aliases: []string{"pci:v1AF4*", "x"}},
	}
	if got, want := modulesDep(mods), "kernel/ring.ko:\nkernel/virtio.ko: kernel/ring.ko\nkernel/pci.ko: kernel/virtio.ko kernel/ring.ko\n"; got != want {
		t.Errorf("modules.dep:\n%s\nwant\n%s", got, want)
	}
	if got, want := modulesAlias(mods), "alias pci:v1AF4* pci\nalias x pci\n"; got != want {
		t.Errorf("modules.alias %q, want %q", got, want)
	}
	mods = append(mods, packedModule{name: "evdev"}, packedModule{name: "my_mod"})
	if got, want := loadList(mods, []string{"my-mod"}), "evdev\nmy_mod\n"; got != want {
		t.Errorf("ditto.load %q, want %q", got, want)
	}
}

func TestParseModinfo(t *testing.T) {
	section := "license=GPL\x00depends=virtio,virtio-ring\x00alias=pci:v1*\x00alias=bad one\x00depends=\x00alias=\x00odd\x00"
	depends, aliases := parseModinfo([]byte(section))
	if !slices.Equal(depends, []string{"virtio", "virtio_ring"}) || !slices.Equal(aliases, []string{"pci:v1*"}) {
		t.Errorf("got %q %q", depends, aliases)
	}
}

func FuzzModinfo(f *testing.F) {
	f.Add([]byte("depends=a,b\x00alias=x y\x00alias=z"))
	f.Fuzz(func(t *testing.T, b []byte) {
		_, _ = modinfoSection(b)
		_, aliases := parseModinfo(b)
		for _, a := range aliases {
			if strings.ContainsAny(a, " \n\t") {
				t.Errorf("alias %q would break modules.alias", a)
			}
		}
	})
}

func TestOwnRecordsRefusesFolders(t *testing.T) {
	initPath := filepath.Join(t.TempDir(), "init")
	if err := os.WriteFile(initPath, []byte("elf"), 0o755); err != nil {
		t.Fatal(err)
	}
	o := Options{Files: map[string]string{"etc/x": t.TempDir()}, Run: "true"}
	if _, err := o.ownRecords(nil, initPath); err == nil {
		t.Error("a folder passed for a file")
	}
	o.Files = map[string]string{"etc/x": initPath}
	rs, err := o.ownRecords(nil, initPath)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, r := range rs {
		names = append(names, r.Name)
	}
	for _, want := range []string{"init", "sbin/modprobe", "sbin/poweroff", "etc/ditto/run", "etc/x"} {
		if !slices.Contains(names, want) {
			t.Errorf("no %s among %q", want, names)
		}
	}
}
