package devices

import (
	"fmt"
	"sort"
	"sync"
	"sync/atomic"
)

// Handler answers accesses to a register window. Calls come from vCPU threads,
// several at once: a handler has its own lock and never waits for a guest.
type Handler interface {
	// ReadRegister fills data with the bytes at offset from the start of the
	// window. It fills all of data; what does not exist reads as ones or
	// zeros as the device's specification says.
	ReadRegister(offset uint64, data []byte)
	// WriteRegister writes data at offset from the start of the window.
	WriteRegister(offset uint64, data []byte)
}

// Bus maps addresses to handlers: one Bus for ports, one for MMIO. Lookups are
// lock-free; changes (a BAR moved by the guest) replace the table.
type Bus struct {
	mu      sync.Mutex // serializes changes to windows
	windows atomic.Pointer[[]window]
}

type window struct {
	base, size uint64
	handler    Handler
}

// Add registers handler for [base, base+size). It fails when the window is
// empty, wraps around or overlaps another.
func (b *Bus) Add(base, size uint64, handler Handler) error {
	if size == 0 || base+size-1 < base {
		return fmt.Errorf("register window [%#x, +%#x) is empty or wraps", base, size)
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.snapshot()
	i := sort.Search(len(old), func(i int) bool { return old[i].base > base })
	if i > 0 && base-old[i-1].base < old[i-1].size {
		return fmt.Errorf("register window [%#x, +%#x) overlaps [%#x, +%#x)", base, size, old[i-1].base, old[i-1].size)
	}
	if i < len(old) && old[i].base-base < size {
		return fmt.Errorf("register window [%#x, +%#x) overlaps [%#x, +%#x)", base, size, old[i].base, old[i].size)
	}
	changed := make([]window, 0, len(old)+1)
	changed = append(changed, old[:i]...)
	changed = append(changed, window{base, size, handler})
	changed = append(changed, old[i:]...)
	b.windows.Store(&changed)
	return nil
}

// Remove forgets the window that starts at base, if there is one.
func (b *Bus) Remove(base uint64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	old := b.snapshot()
	changed := make([]window, 0, len(old))
	for _, w := range old {
		if w.base != base {
			changed = append(changed, w)
		}
	}
	b.windows.Store(&changed)
}

// Read dispatches a read. It reports whether a handler covers the whole access;
// if none does, data is untouched.
func (b *Bus) Read(addr uint64, data []byte) bool {
	w := b.find(addr, uint64(len(data)))
	if w == nil {
		return false
	}
	w.handler.ReadRegister(addr-w.base, data)
	return true
}

// Write dispatches a write. It reports whether a handler covers the whole
// access.
func (b *Bus) Write(addr uint64, data []byte) bool {
	w := b.find(addr, uint64(len(data)))
	if w == nil {
		return false
	}
	w.handler.WriteRegister(addr-w.base, data)
	return true
}

func (b *Bus) snapshot() []window {
	if p := b.windows.Load(); p != nil {
		return *p
	}
	return nil
}

func (b *Bus) find(addr, n uint64) *window {
	windows := b.snapshot()
	i := sort.Search(len(windows), func(i int) bool { return windows[i].base > addr }) - 1
	if i < 0 {
		return nil
	}
	w := &windows[i]
	if off := addr - w.base; off >= w.size || n > w.size-off {
		return nil
	}
	return w
}
