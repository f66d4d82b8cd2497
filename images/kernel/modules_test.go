package kernel

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// fakeModule is the smallest ELF file with a .modinfo section.
func fakeModule(modinfo string) []byte {
	const ehdr, shdr = 64, 64
	names := "\x00.modinfo\x00.shstrtab\x00"
	infoOff := uint64(ehdr + 3*shdr)
	namesOff := infoOff + uint64(len(modinfo))
	b := make([]byte, infoOff, int(infoOff)+len(modinfo)+len(names))
	copy(b, "\x7fELF\x02\x01\x01")
	le := binary.LittleEndian
	le.PutUint16(b[16:], 1)  // ET_REL
	le.PutUint16(b[18:], 62) // EM_X86_64
	le.PutUint32(b[20:], 1)
	le.PutUint64(b[40:], ehdr) // e_shoff
	le.PutUint16(b[52:], ehdr)
	le.PutUint16(b[58:], shdr)
	le.PutUint16(b[60:], 3) // e_shnum
	le.PutUint16(b[62:], 2) // e_shstrndx
	section := func(i int, name, kind uint32, off uint64, size int) {
		h := b[ehdr+i*shdr:]
		le.PutUint32(h[0:], name)
		le.PutUint32(h[4:], kind)
		le.PutUint64(h[24:], off)
		le.PutUint64(h[32:], uint64(size))
	}
	section(1, 1, 1, infoOff, len(modinfo))
	section(2, 10, 3, namesOff, len(names))
	return append(append(b, modinfo...), names...)
}

// fakeTree makes a modules folder; the map is from path to modinfo.
func fakeTree(t *testing.T, builtin string, modules map[string]string) Kernel {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "modules.builtin"), []byte(builtin), 0o644); err != nil {
		t.Fatal(err)
	}
	for path, info := range modules {
		data := fakeModule(info)
		if strings.HasSuffix(path, ".gz") {
			var buf bytes.Buffer
			w := gzip.NewWriter(&buf)
			if _, err := w.Write(data); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			data = buf.Bytes()
		}
		path = filepath.Join(dir, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return Kernel{Version: "test", ModulesDir: dir}
}

func TestModulesOrder(t *testing.T) {
	k := fakeTree(t, "kernel/drivers/virtio/virtio.ko\nkernel/lib/crc32c.ko\n", map[string]string{
		"kernel/fs/ext4/ext4.ko":             "license=GPL\x00softdep=pre: crc32c post: nothing\x00depends=mbcache,jbd2\x00",
		"kernel/fs/jbd2/jbd2.ko.gz":          "depends=crc16\x00",
		"kernel/lib/crc16.ko":                "depends=\x00",
		"kernel/fs/mbcache.ko":               "depends=\x00",
		"kernel/drivers/block/virtio-blk.ko": "depends=virtio\x00softdep=pre: no-such-thing\x00",
		"kernel/a.ko":                        "depends=b\x00",
		"kernel/b.ko":                        "depends=a\x00",
		"kernel/c.ko":                        "depends=gone\x00",
		"kernel/readme.kok":                  "",
	})
	mods, err := k.Modules("ext4", "virtio_blk", "crc32c", "jbd2")
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, m := range mods {
		names = append(names, m.Name)
		if !bytes.HasPrefix(m.Data, []byte("\x7fELF")) {
			t.Errorf("%s is not decompressed", m.Path)
		}
	}
	want := []string{"mbcache", "crc16", "jbd2", "ext4", "virtio_blk"}
	if !slices.Equal(names, want) {
		t.Errorf("Modules = %v, want %v", names, want)
	}
	if !k.HasModule("virtio") || !k.HasModule("virtio-blk") || k.HasModule("nothing") || k.HasModule("readme") {
		t.Error("HasModule is wrong")
	}
	if _, err := k.Modules("nothing"); !errors.Is(err, ErrNoModule) {
		t.Errorf("an unknown module: %v", err)
	}
	if _, err := k.Modules("c"); !errors.Is(err, ErrNoModule) {
		t.Errorf("a missing dependency: %v", err)
	}
	if _, err := k.Modules("a"); err == nil || !strings.Contains(err.Error(), "depends on itself") {
		t.Errorf("a cycle: %v", err)
	}
	if _, err := (Kernel{}).Modules("a"); err == nil {
		t.Error("a kernel without modules has modules")
	}
}

func TestBadModule(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string][]byte{"text.ko": []byte("text"), "short.ko.gz": []byte("\x1f\x8b"), "cut.ko": fakeModule("depends=\x00")[:100]} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	k := Kernel{ModulesDir: dir}
	for _, name := range []string{"text", "short", "cut"} {
		if _, err := k.Modules(name); err == nil {
			t.Errorf("%s was taken as a module", name)
		}
	}
}

// FuzzModinfo feeds whole modules: what a .ko says is not trusted.
func FuzzModinfo(f *testing.F) {
	f.Add(fakeModule("depends=a,b\x00softdep=pre: c d post: e\x00"))
	f.Add(fakeModule("depends=\x00"))
	f.Add([]byte("\x7fELF"))
	f.Fuzz(func(t *testing.T, module []byte) {
		info, err := readModinfo(module)
		if err != nil {
			return
		}
		for _, name := range append(info.hard, info.soft...) {
			if name == "" || strings.ContainsAny(name, "/,") {
				t.Errorf("dependency %q", name)
			}
		}
	})
}
