package qcow2

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

// seeds are small images of QEMU's and of our own.
func seeds(f *testing.F) [][]byte {
	f.Helper()
	dir := f.TempDir()
	var out [][]byte
	add := func(path string) {
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		out = append(out, b)
	}
	own := filepath.Join(dir, "own")
	if err := Create(own, CreateOptions{Size: 1 << 20, ClusterSize: 512, Backing: "base", BackingFormat: "raw"}); err != nil {
		f.Fatal(err)
	}
	add(own)
	if _, err := exec.LookPath("qemu-img"); err != nil {
		return out // the committed corpus has some of QEMU's
	}
	source := filepath.Join(dir, "raw")
	content := append(bytes.Repeat([]byte("qcow2 "), 2000), make([]byte, 4288)...)
	if err := os.WriteFile(source, content[:16<<10], 0o600); err != nil {
		f.Fatal(err)
	}
	for _, args := range [][]string{
		{"-o", "cluster_size=512"}, {"-c", "-o", "cluster_size=4k"}, {"-c", "-o", "cluster_size=512,compression_type=zstd"},
		{"-o", "cluster_size=1k,compat=0.10"}, {"-o", "cluster_size=512,refcount_bits=1"},
	} {
		path := filepath.Join(dir, "qemu")
		command := append(append([]string{"convert", "-f", "raw", "-O", "qcow2"}, args...), source, path)
		if b, err := exec.Command("qemu-img", command...).CombinedOutput(); err != nil {
			f.Fatalf("%v: %s", err, b)
		}
		add(path)
	}
	return out
}

// FuzzHeader: whatever the header says, it is refused or within bounds.
func FuzzHeader(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b[:512], int64(len(b)))
	}
	f.Fuzz(func(t *testing.T, b []byte, length int64) {
		h, err := parseHeader(b, length)
		if err != nil {
			return
		}
		switch cs := h.ClusterSize(); {
		case h.Size < 0 || h.l1Needed(h.Size) > int64(h.l1Entries):
			t.Errorf("size %d with %d L1 entries", h.Size, h.l1Entries)
		case cs < 512 || cs > 2<<20 || int64(h.l1Entries)*8 > maxL1Bytes || int64(h.refClusters)*cs > maxRefTable:
			t.Errorf("out of bounds: %+v", h)
		case len(h.BackingFile) > maxBackingName:
			t.Errorf("backing file name of %d bytes", len(h.BackingFile))
		}
		checkRename(t, h, b[:min(int64(len(b)), h.ClusterSize())], length)
	})
}

// checkRename: a header with another backing file is like it in all else.
func checkRename(t *testing.T, h *Header, b []byte, length int64) {
	for _, name := range []string{"", "another.img"} {
		format := map[bool]string{true: "raw"}[name != ""]
		renamed, err := h.withBacking(b, name, format)
		if err != nil {
			continue // no room
		}
		got, err := parseHeader(renamed, length)
		if err != nil {
			t.Fatalf("with the backing file %q: %v", name, err)
		}
		want := *h
		want.BackingFile, want.BackingFormat = name, format
		if *got != want {
			t.Errorf("it became %+v, want %+v", *got, want)
		}
	}
}

// FuzzImage reads and writes images of any content. Nothing panics, loops or
// reads beyond the disk, and what is written is read again.
func FuzzImage(f *testing.F) {
	for _, b := range seeds(f) {
		f.Add(b, uint32(0))
		f.Add(b, uint32(4097))
	}
	f.Fuzz(func(t *testing.T, b []byte, at uint32) {
		if len(b) > 1<<20 {
			return
		}
		reader, err := Open(&memFile{data: bytes.Clone(b)}, Options{ReadOnly: true})
		if err == nil {
			touchAll(reader, int64(at))
		}
		w, err := Open(&memFile{data: bytes.Clone(b)}, Options{})
		if err != nil {
			return
		}
		touchAll(w, int64(at))
		if w.Size() < 512 {
			return
		}
		offset := int64(at) % (w.Size() - 511)
		data := bytes.Repeat([]byte{0xa5}, 512)
		if err := w.WriteAtv([][]byte{data}, offset); err == nil {
			got := make([]byte, 512)
			if err := w.ReadAtv([][]byte{got}, offset); err == nil && !bytes.Equal(got, data) {
				t.Error("read something else than was written")
			}
		}
		_ = w.Discard(offset&^511, 512)
		_ = w.WriteZeroes(offset, 512, at%2 == 0)
		_ = w.Flush()
		_ = w.Resize(w.Size() + 1<<20)
		_ = w.Close()
	})
}

// touchAll maps the beginning of the disk and reads some of it.
func touchAll(f *File, at int64) {
	for offset := int64(0); offset < min(f.Size(), 1<<22); {
		e, err := f.Map(offset, f.Size()-offset)
		if err != nil {
			offset += f.pages.size / 8 << f.h.ClusterBits
			continue
		}
		if e.Length <= 0 {
			panic("an extent of no length")
		}
		_ = f.ReadAtv([][]byte{make([]byte, min(e.Length, 4096))}, offset)
		offset += e.Length
	}
	if at < f.Size() {
		_ = f.ReadAtv([][]byte{make([]byte, min(512, f.Size()-at))}, at)
	}
}

// TestBoundedOpen: a small file cannot make the reader allocate much.
func TestBoundedOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := Create(path, CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	binary.BigEndian.PutUint32(b[offL1Size:], maxL1Bytes/8)
	if _, err := Open(&memFile{data: b}, Options{}); err == nil {
		t.Error("an L1 table longer than the file was accepted")
	}
}
