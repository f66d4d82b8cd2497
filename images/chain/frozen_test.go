package chain

import (
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/images/disk"
)

// TestFrozenFiles: a file without write permissions is written by nobody, not
// even by who merges an overlay into it, and is read all the same.
func TestFrozenFiles(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
	makeBase(t, base, rand.New(rand.NewSource(1)), 1<<20)
	if err := CreateOverlay(top, base, Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{base, top} {
		if err := os.Chmod(path, 0o444); err != nil {
			t.Fatal(err)
		}
		if c, err := Open(path, Options{}); !errors.Is(err, disk.ErrFrozen) {
			if err == nil {
				_ = c.Close()
			}
			t.Errorf("%s is open for writing: %v", path, err)
		}
		if err := openChain(t, path, Options{ReadOnly: true}).Close(); err != nil {
			t.Error(err)
		}
	}
	if err := os.Chmod(top, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := Commit(top); !errors.Is(err, disk.ErrFrozen) {
		t.Errorf("an overlay is merged into it: %v", err)
	}
	below, format, err := Backing(top)
	if err != nil || below != base || format != Raw {
		t.Errorf("it is on %q (%s), %v", below, format, err)
	}
}

// TestFreeze: a disk that is frozen is read by others too and cannot be written,
// until it is thawed.
func TestFreeze(t *testing.T) {
	for _, format := range []Format{Raw, Qcow2} {
		path := filepath.Join(t.TempDir(), "disk")
		if err := create(path, format, 1<<20); err != nil {
			t.Fatal(err)
		}
		c := openChain(t, path, Options{Format: format})
		data := [][]byte{make([]byte, 4096)}
		data[0][7] = 1
		if err := c.WriteAtv(data, 8192); err != nil {
			t.Fatal(err)
		}
		if err := c.Freeze(); err != nil {
			t.Fatal(err)
		}
		before, err := c.Layers()[0].Stamp()
		if err != nil {
			t.Fatal(err)
		}
		other := openChain(t, path, Options{ReadOnly: true, Format: format})
		if got := readAll(t, other); got[8199] != 1 {
			t.Errorf("%s: what was written is not there", format)
		}
		if err := c.Thaw(); !errors.Is(err, disk.ErrLocked) {
			t.Errorf("%s: thawed although another reads it: %v", format, err)
		}
		if err := other.Close(); err != nil {
			t.Fatal(err)
		}
		if after, err := c.Layers()[0].Stamp(); err != nil || after != before {
			t.Errorf("%s: it changed while it was frozen: %s, %v", format, before.Difference(after), err)
		}
		if err := c.Thaw(); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(c.WriteAtv(data, 0), c.Close()); err != nil {
			t.Errorf("%s: after it was thawed: %v", format, err)
		}
	}
}
