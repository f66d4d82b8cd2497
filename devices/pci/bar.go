package pci

import (
	"encoding/binary"
	"fmt"
	"math/bits"

	"ditto.vm/devices"
	"ditto.vm/memory"
)

// maxBARs is how many base address registers a type 0 header has.
const maxBARs = 6

// BAR is a register window whose address the guest chooses: a 32-bit,
// non-prefetchable memory BAR (PCI 3.0 6.2.5.1).
type BAR struct {
	// Size is a power of two of at least 4 KiB, so that no two functions
	// share a page.
	Size uint64
	// Handler answers accesses. It stays the same wherever the BAR moves.
	Handler devices.Handler
	// Mapped, if not nil, is called when the BAR appears at an address, and
	// Unmapped before it goes from there. They must not touch configuration
	// space.
	Mapped, Unmapped func(base memory.GPA)
}

type bar struct {
	BAR
	mapped bool
	base   memory.GPA // where it is mapped
}

// AddBAR gives the endpoint its BAR number i. Call it before the endpoint is
// on a bus.
func (e *Endpoint) AddBAR(i int, b BAR) error {
	switch {
	case i < 0 || i >= maxBARs:
		return fmt.Errorf("pci: BAR %d does not exist", i)
	case e.bars[i].Size != 0:
		return fmt.Errorf("pci: BAR %d is taken", i)
	case b.Size < memory.PageSize || b.Size > 1<<30 || bits.OnesCount64(b.Size) != 1:
		return fmt.Errorf("pci: BAR of %#x bytes", b.Size)
	}
	e.bars[i].BAR = b
	binary.LittleEndian.PutUint32(e.writable[regBAR0+4*i:], ^uint32(b.Size-1))
	return nil
}

// place gives every BAR an address from next up and returns the next free
// one.
func (e *Endpoint) place(next memory.GPA, window memory.Range) (memory.GPA, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	for i := range e.bars {
		size := e.bars[i].Size
		if size == 0 {
			continue
		}
		base := (next + memory.GPA(size-1)) &^ memory.GPA(size-1)
		if !window.Contains(base, size) {
			return 0, fmt.Errorf("pci: no room for a BAR of %#x bytes in [%s, +%#x)", size, window.Start, window.Size)
		}
		binary.LittleEndian.PutUint32(e.config[regBAR0+4*i:], uint32(base))
		next = base + memory.GPA(size)
	}
	return next, nil
}

// followBARs maps and unmaps windows as the command register and the BARs now
// say. All that move are unmapped first, because BARs may swap places.
//
// Preconditions: mu is held.
func (e *Endpoint) followBARs() {
	if e.bus == nil {
		return
	}
	decode := e.config[regCommand]&commandMemory != 0
	for i := range e.bars {
		b := &e.bars[i]
		if b.mapped && (!decode || b.base != e.barBase(i)) {
			if b.Unmapped != nil {
				b.Unmapped(b.base)
			}
			e.bus.config.MMIO.Remove(uint64(b.base))
			b.mapped = false
		}
	}
	for i := range e.bars {
		if b := &e.bars[i]; decode && b.Size != 0 && !b.mapped {
			e.mapBAR(i)
		}
	}
}

// mapBAR registers the window of BAR i, if it may lie where the guest put it.
// Anything else stays unmapped, as while the guest reads its size with ones.
//
// Preconditions: mu is held.
func (e *Endpoint) mapBAR(i int) {
	b, base := &e.bars[i], e.barBase(i)
	if !e.bus.config.Window.Contains(base, b.Size) {
		return
	}
	if err := e.bus.config.MMIO.Add(uint64(base), b.Size, b.Handler); err != nil {
		e.bus.config.Log.Debug("BAR is not mapped", "bar", i, "gpa", base, "err", err)
		return
	}
	b.mapped, b.base = true, base
	if b.Mapped != nil {
		b.Mapped(base)
	}
}

// barBase is the address in BAR i's register.
//
// Preconditions: mu is held.
func (e *Endpoint) barBase(i int) memory.GPA {
	return memory.GPA(binary.LittleEndian.Uint32(e.config[regBAR0+4*i:]))
}
