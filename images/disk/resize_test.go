package disk

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// TestResize: a file grows by zeros, loses its end, and keeps its size when it
// cannot have another.
func TestResize(t *testing.T) {
	for _, cache := range []Cache{CacheWriteback, CacheNone} {
		path := makeDisk(t, 64<<10)
		r := open(t, path, Options{Cache: cache})
		page := r.buffer(4096)
		copy(page, "the end")
		if err := r.WriteAtv([][]byte{page}, 60<<10); err != nil {
			t.Fatal(err)
		}
		for _, size := range []int64{128 << 10, 60 << 10, 64 << 10} {
			if err := r.Resize(size); err != nil {
				t.Fatal(err)
			}
			info, err := os.Stat(path)
			if err != nil || info.Size() != size || r.Size() != size || r.Identity().Size != size {
				t.Errorf("%s: size %d, identity %s, file %v, %v; want %d", cache, r.Size(), r.Identity(), info.Size(), err, size)
			}
		}
		if err := r.ReadAtv([][]byte{page}, 60<<10); err != nil || page[0] != 0 {
			t.Errorf("%s: what was cut off is back: %q, %v", cache, page[:8], err)
		}
		for _, size := range []int64{0, -512, 1000} {
			var e *Error
			if err := r.Resize(size); !errors.As(err, &e) || r.Size() != 64<<10 {
				t.Errorf("%s: size %d: %v, now %d", cache, size, err, r.Size())
			}
		}
	}
}

// TestResizeIsRefused: not what is read-only, and not while somebody else relies
// on the length.
func TestResizeIsRefused(t *testing.T) {
	path := makeDisk(t, 64<<10)
	r := open(t, path, Options{ReadOnly: true})
	var e *Error
	if err := r.Resize(128 << 10); !errors.As(err, &e) {
		t.Errorf("a read-only disk: %v", err)
	}

	path = makeDisk(t, 64<<10)
	w := open(t, path, Options{})
	other, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	if err := setLock(int(other.Fd()), unix.F_RDLCK, unsharedBase+3, 1); err != nil {
		t.Fatal(err)
	}
	if err := w.Resize(128 << 10); !errors.Is(err, ErrLocked) || w.Size() != 64<<10 {
		t.Errorf("while somebody relies on the length: %v", err)
	}
	if err := setLock(int(other.Fd()), unix.F_UNLCK, unsharedBase+3, 1); err != nil {
		t.Fatal(err)
	}
	if err := w.Resize(128 << 10); err != nil {
		t.Error(err)
	}
	// The disk is still locked as before, and no more.
	if _, err := Open(path, Options{}); !errors.Is(err, ErrLocked) {
		t.Errorf("a second writer: %v", err)
	}
	if err := testLock(int(other.Fd()), permBase+3); err != nil {
		t.Errorf("the length is still locked: %v", err)
	}
}
