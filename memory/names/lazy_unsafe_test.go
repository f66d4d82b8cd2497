package names

import (
	"errors"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// resident reads how many pages of a mapping the kernel has made.
func resident(mapping []byte) (n int, err error) {
	pages := make([]byte, (len(mapping)+memory.PageSize-1)/memory.PageSize)
	// SAFETY: the kernel writes a byte for each page of the range.
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&mapping[0])), uintptr(len(mapping)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return 0, errno
	}
	for _, p := range pages {
		n += int(p & 1)
	}
	return n, nil
}

// TestTableIsLazy: a table costs memory where pages are named, and none when it
// is closed.
func TestTableIsLazy(t *testing.T) {
	space, err := memory.New(memory.Config{Size: 2 << 30})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	table := NewTable(space)
	mappings := table.lazy.mappings
	if len(mappings) < 3 {
		t.Fatalf("%d arrays are mapped", len(mappings))
	}
	id, err := table.AddLayer(Layer{Size: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	count := func() (n int) {
		for _, m := range mappings {
			pages, err := resident(m)
			if err != nil {
				t.Fatal(err)
			}
			n += pages
		}
		return n
	}
	before := count()
	for i := range uint64(100) {
		table.Record(memory.GPA(i)<<memory.PageShift, OfBlock(id, i))
	}
	if got := count() - before; before > 3 || got < 1 || got > 64 {
		t.Errorf("%d pages at first, and %d more for 100 names", before, got)
	}
	if err := table.Close(); err != nil {
		t.Fatal(err)
	}
	for _, m := range mappings {
		if _, err := resident(m); !errors.Is(err, unix.ENOMEM) {
			t.Errorf("a mapping is left: %v", err)
		}
	}
}
