package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
	"ditto.vm/migration/snapshot"
)

// part is a member of an archive.
type part struct {
	tar.Header
	body []byte
}

// take takes an archive to pieces.
func take(t testing.TB, b []byte) []part {
	t.Helper()
	var all []part
	for r := tar.NewReader(bytes.NewReader(unpack(t, b))); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, part{tar.Header{Typeflag: tar.TypeReg, Name: h.Name, Size: h.Size, Mode: 0o600}, body})
	}
}

func unpack(t testing.TB, b []byte) []byte {
	t.Helper()
	z, err := zstd.NewReader(bytes.NewReader(b))
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	out, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func pack(t testing.TB, b []byte) []byte {
	t.Helper()
	z, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer z.Close()
	return z.EncodeAll(b, nil)
}

// join puts pieces together again.
func join(t testing.TB, all []part) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, p := range all {
		if p.Typeflag == tar.TypeReg {
			p.Size = int64(len(p.body))
		}
		if err := w.WriteHeader(&p.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(p.body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// hostile tries to import bytes, and checks that nothing is left anywhere.
type hostile struct {
	t   testing.TB
	dir string
}

func newHostile(t testing.TB) *hostile {
	h := &hostile{t, filepath.Join(quickDir(t), "in", "here")}
	if err := os.MkdirAll(h.dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return h
}

// imports returns the error of importing b.
func (h *hostile) imports(b []byte) error {
	h.t.Helper()
	_, err := Import(context.Background(), bytes.NewReader(b), filepath.Join(h.dir, "there"), Options{})
	entries, readErr := os.ReadDir(h.dir)
	if err == nil {
		os.RemoveAll(filepath.Join(h.dir, "there"))
		entries = slices.DeleteFunc(entries, func(e os.DirEntry) bool { return e.Name() == "there" })
	}
	if readErr != nil || len(entries) > 0 || len(list(h.t, filepath.Dir(h.dir))) > 0 {
		h.t.Errorf("left behind: %v, %v", entries, readErr)
	}
	return err
}

// TestHostile: an archive that is not what Export makes is refused.
func TestHostile(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	whole := take(t, s.export("second"))
	h := newHostile(t)
	if err := h.imports(pack(t, join(t, whole))); err != nil {
		t.Fatal(err)
	}
	place := func(name string) int {
		return slices.IndexFunc(whole, func(p part) bool { return strings.HasSuffix(p.Name, name) })
	}
	// list changes the first member.
	list := func(change func(x *index)) func([]part) []part {
		return func(all []part) []part {
			var x index
			if err := json.Unmarshal(all[0].body, &x); err != nil {
				t.Fatal(err)
			}
			change(&x)
			all[0].body, _ = x.encode()
			return all
		}
	}
	rename := func(name string) func([]part) []part {
		return func(all []part) []part { all[5].Name = name; return all }
	}
	flip := func(n, at int) func([]part) []part {
		return func(all []part) []part { all[n].body[at] ^= 1; return all }
	}
	link := func(kind byte, name, to string) func([]part) []part {
		return func(all []part) []part {
			return slices.Insert(all, 5, part{Header: tar.Header{Typeflag: kind, Name: name, Linkname: to, Mode: 0o600}})
		}
	}
	text := func(old, new string) func([]part) []part {
		return func(all []part) []part {
			b := strings.Replace(string(all[0].body), old, new, 1)
			if b == string(all[0].body) {
				t.Fatalf("no %s in %s", old, b)
			}
			all[0].body = []byte(b)
			return all
		}
	}
	for _, c := range []struct {
		name   string
		change func([]part) []part
		want   error
	}{
		{"nothing", func([]part) []part { return nil }, ErrFormat},
		{"a list alone", func(all []part) []part { return all[:1] }, ErrFormat},
		{"an end too early", func(all []part) []part { return all[:len(all)-1] }, ErrFormat},
		{"a member too many", func(all []part) []part { return append(all, part{all[1].Header, nil}) }, ErrFormat},
		{"a member twice", func(all []part) []part { return slices.Insert(all, 3, all[2]) }, ErrFormat},
		{"members in another order", func(all []part) []part { all[3], all[4] = all[4], all[3]; return all }, ErrFormat},
		{"a path upwards", rename("../../x"), ErrFormat},
		{"an absolute path", rename(filepath.Join(h.dir, "x")), ErrFormat},
		{"another name", rename("second/x"), ErrFormat},
		{"a symbolic link", link(tar.TypeSymlink, "second/sections", "/tmp"), ErrFormat},
		{"a hard link", link(tar.TypeLink, "second/sections/x", "/etc/passwd"), ErrFormat},
		{"a link for a file", func(all []part) []part {
			n := place("second/sections/rtc")
			all[n].Typeflag, all[n].Linkname = tar.TypeSymlink, "/etc/passwd"
			return all
		}, ErrFormat},
		{"a folder", link(tar.TypeDir, "second/x/", ""), ErrFormat},
		{"a device", link(tar.TypeBlock, "second/x", ""), ErrFormat},
		{"another size", func(all []part) []part { all[2].body = append(all[2].body, 0); return all }, ErrFormat},
		{"another manifest", flip(1, 40), snapshot.ErrFormat},
		{"another page map", flip(2, 200), snapshot.ErrFormat},
		{"other pages", flip(3, 5000), snapshot.ErrFormat},
		{"another section", flip(4, 2), snapshot.ErrFormat},
		{"another layer", flip(place(s.disks[2].id.String()+".raw"), 4095), snapshot.ErrLayer},
		{"an image that is none", flip(place(s.disks[1].id.String()+".qcow2"), 0), ErrFormat},
		{"a newer version", text(`"format": 1`, `"format": 2, "more": 1`), snapshot.ErrVersion},
		{"no version", text(`"format": 1`, `"format": 0`), ErrFormat},
		{"an unknown member of the list", text(`"format": 1`, `"format": 1, "more": 1`), ErrFormat},
		{"two lists", func(all []part) []part { all[0].body = append(all[0].body, all[0].body...); return all }, ErrFormat},
		{"a long list", func(all []part) []part { all[0].body = append(all[0].body, make([]byte, maxIndex)...); return all }, ErrFormat},
		{"no snapshots", list(func(x *index) { x.Snapshots = nil }), ErrFormat},
		{"many snapshots", list(func(x *index) { x.Snapshots = slices.Repeat(x.Snapshots, 40) }), ErrFormat},
		{"two of one name", list(func(x *index) { x.Snapshots[1].Name = x.Snapshots[0].Name }), ErrFormat},
		{"a folder upwards", list(func(x *index) { x.Snapshots[1].Name = "../x" }), ErrFormat},
		{"no folder", list(func(x *index) { x.Snapshots[1].Name = "." }), ErrFormat},
		{"the folder of layers", list(func(x *index) { x.Snapshots[1].Name = "layers" }), ErrFormat},
		{"a hidden folder", list(func(x *index) { x.Snapshots[1].Name = ".x" }), ErrFormat},
		{"a working set without size", list(func(x *index) { x.Snapshots[1].WorkingSet = -1 }), ErrFormat},
		{"another identity", list(func(x *index) { x.Snapshots[0].ID[3] ^= 1 }), ErrFormat},
		{"the parent first", list(func(x *index) { slices.Reverse(x.Snapshots) }), ErrFormat},
		{"an image upwards", list(func(x *index) { x.Images[0].Name = "../x.raw" }), ErrFormat},
		{"an image of another name", list(func(x *index) { x.Images[0].Name = "below-0.raw" }), ErrFormat},
		{"an image of another format", list(func(x *index) { x.Images[0].Format = "../x" }), ErrFormat},
		{"an image without size", list(func(x *index) { x.Images[0].Size = -1 }), ErrFormat},
		{"an image without bound", list(func(x *index) { x.Images[0].Size = 1 << 60 }), ErrFormat},
		{"an image of another size", list(func(x *index) { x.Images[0].Size++ }), ErrFormat},
		{"an identity that is none", list(func(x *index) { x.Images[0].IDs = []layer.ID{{1}} }), ErrFormat},
		{"an identity twice", list(func(x *index) { x.Images[0].IDs = append(x.Images[0].IDs, x.Images[1].IDs...) }), ErrFormat},
		{"an image on itself", list(func(x *index) { x.Images[1].Below = x.Images[1].Name }), ErrFormat},
		{"an image on a later one", list(func(x *index) { x.Images[1].Below = x.Images[len(x.Images)-1].Name }), ErrFormat},
		{"an image on one elsewhere", list(func(x *index) { x.Images[1].Below = s.disks[0].path }), ErrFormat},
		{"an image on nothing", list(func(x *index) {
			for i := range x.Images {
				x.Images[i].Below = ""
			}
		}), snapshot.ErrLayer},
		{"many images", list(func(x *index) { x.Images = slices.Repeat(x.Images, maxImages) }), ErrFormat},
		{"a layer is missing", func(all []part) []part {
			n := place(s.disks[2].id.String() + ".raw")
			all = slices.Delete(all, n, n+1)
			return list(func(x *index) {
				x.Images = slices.DeleteFunc(x.Images, func(i image) bool { return slices.Contains(i.IDs, s.disks[2].id) })
			})(all)
		}, ErrFormat},
	} {
		all := slices.Clone(whole)
		for i := range all {
			all[i].body = bytes.Clone(all[i].body)
		}
		if err := h.imports(pack(t, join(t, c.change(all)))); !errors.Is(err, c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
	plain := join(t, whole)
	for name, b := range map[string][]byte{
		"no tar":                   []byte(strings.Repeat("x", 2000)),
		"cut off":                  plain[:len(plain)-1024-512],
		"more behind":              append(bytes.Clone(plain), strings.Repeat("x", 512)...),
		"zeros behind without end": append(bytes.Clone(plain), make([]byte, 1<<20)...),
	} {
		if err := h.imports(pack(t, b)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestAltered alters and cuts off an archive, at many places and near its ends at
// all.
func TestAltered(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.Zstd)
	b := s.export("first")
	plain := unpack(t, b)
	h := newHostile(t)
	step := len(b) / 150
	for at := 0; at < len(b); at++ {
		if at > 60 && at < len(b)-60 && at%step != 0 {
			continue
		}
		b[at] ^= 1 << (at % 8)
		// Some bits of a compressed stream mean nothing.
		if err := h.imports(b); err == nil && !bytes.Equal(unpack(t, b), plain) {
			t.Errorf("nobody noticed that byte %d of %d was altered", at, len(b))
		}
		b[at] ^= 1 << (at % 8)
		if err := h.imports(b[:at]); !errors.Is(err, ErrFormat) {
			t.Errorf("cut off after %d of %d bytes: %v", at, len(b), err)
		}
	}
	if err := h.imports(append(bytes.Clone(b), "more"...)); !errors.Is(err, ErrFormat) {
		t.Errorf("bytes behind it: %v", err)
	}
	if err := h.imports(b); err != nil {
		t.Error(err)
	}
}

// TestReadFails: an error of reading is not the archive's.
func TestReadFails(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	b := s.export("first")
	broken := errors.New("the network is gone")
	r := io.MultiReader(bytes.NewReader(b[:len(b)/2]), failing{broken})
	_, err := Import(context.Background(), r, filepath.Join(t.TempDir(), "x"), Options{})
	if !errors.Is(err, broken) || errors.Is(err, ErrFormat) {
		t.Errorf("%v", err)
	}
}

type failing struct{ err error }

func (f failing) Read([]byte) (int, error) { return 0, f.err }

// TestDiskFull: a full disk is told of, and nothing is left on it.
func TestDiskFull(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	b := s.export("second")
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=200k"); err != nil {
		t.Skipf("no small file system can be mounted: %v; try: run the test as root", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if _, err := ExportFile(context.Background(), s.at("second"), filepath.Join(dir, "file"), Options{}); !errors.Is(err, snapshot.ErrNoSpace) {
		t.Errorf("export: %v", err)
	}
	if _, err := Import(context.Background(), bytes.NewReader(b), filepath.Join(dir, "there"), Options{}); !errors.Is(err, snapshot.ErrNoSpace) {
		t.Errorf("import: %v", err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) > 0 {
		t.Errorf("left: %v, %v", entries, err)
	}
}

// FuzzImport unpacks anything: a stream, what is in a stream, the list at its
// beginning. It is refused, or what it holds can be read. Nothing is ever left
// elsewhere.
func FuzzImport(f *testing.F) {
	golden, err := os.ReadFile(goldenFile)
	if err != nil {
		f.Fatal(err)
	}
	parts := take(f, golden)
	f.Add(golden, uint8(0))
	f.Add(unpack(f, golden), uint8(1))
	f.Add(parts[0].body, uint8(2))
	h := newHostile(f)
	f.Fuzz(func(t *testing.T, b []byte, kind uint8) {
		switch kind % 3 {
		case 1:
			b = pack(t, b)
		case 2:
			all := slices.Clone(parts)
			all[0].body = b
			b = pack(t, join(t, all))
		}
		h.t = t
		err := h.imports(b)
		known := []error{nil, ErrFormat, snapshot.ErrFormat, snapshot.ErrVersion, snapshot.ErrLayer}
		if !slices.ContainsFunc(known, func(k error) bool { return errors.Is(err, k) }) {
			t.Errorf("it is refused for a reason of its own: %v", err)
		}
	})
}
