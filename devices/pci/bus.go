package pci

import (
	"fmt"
	"log/slog"
	"sync"

	"ditto.vm/devices"
	"ditto.vm/memory"
)

// Slots is how many devices one bus has room for, the host bridge included.
const Slots = 32

// ECAMSize is the size of the ECAM window of one bus, in bytes.
const ECAMSize = 1 << 20

// The legacy configuration ports (PCI 3.0 3.2.2.3.2).
const (
	addressPort = 0xCF8
	dataPort    = 0xCFC
)

// Config says where the bus appears in the machine.
type Config struct {
	// Ports and MMIO are the machine's buses. Ports may be nil: there is no
	// CF8/CFC then.
	Ports, MMIO *devices.Bus
	// ECAM is where the configuration space of bus 0 is mapped, [ECAMSize]
	// bytes.
	ECAM memory.GPA
	// Window is where BARs may lie, inside the first 4 GiB. The ACPI tables
	// name the same range.
	Window memory.Range
	// Log hears of what a guest did that cannot work, at Debug.
	Log *slog.Logger
}

// Bus is PCI bus 0 with its host bridge.
type Bus struct {
	config Config

	mu      sync.Mutex
	slots   [Slots]*Endpoint
	next    memory.GPA // first free address of the window
	address uint32     // what was written to CF8
}

// Function is what occupies a slot: anything with a configuration space.
type Function interface {
	// Endpoint is the function's configuration space, BARs and interrupts.
	Endpoint() *Endpoint
}

// NewBus makes the bus, puts the host bridge in slot 0 and registers ECAM and
// the configuration ports.
func NewBus(config Config) (*Bus, error) {
	w := config.Window
	if w.Size == 0 || uint64(w.End()) > 1<<32 || w.End() < w.Start {
		return nil, fmt.Errorf("pci: BAR window [%s, +%#x) is not below 4 GiB", w.Start, w.Size)
	}
	b := &Bus{config: config, next: w.Start}
	bridge := newHostBridge()
	bridge.attach(b)
	b.slots[0] = bridge
	if err := config.MMIO.Add(uint64(config.ECAM), ECAMSize, ecam{b}); err != nil {
		return nil, fmt.Errorf("pci: ECAM: %w", err)
	}
	if config.Ports == nil {
		return b, nil
	}
	if err := config.Ports.Add(addressPort, 4, addressRegister{b}); err != nil {
		return nil, fmt.Errorf("pci: configuration ports: %w", err)
	}
	if err := config.Ports.Add(dataPort, 4, dataRegister{b}); err != nil {
		return nil, fmt.Errorf("pci: configuration ports: %w", err)
	}
	return b, nil
}

// Add puts f in the lowest free slot, gives its BARs addresses and returns the
// slot. Memory decoding stays off until the guest enables it.
func (b *Bus) Add(f Function) (slot int, err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for slot = range b.slots {
		if b.slots[slot] == nil {
			return slot, b.put(slot, f)
		}
	}
	return 0, fmt.Errorf("pci: all %d slots are taken", Slots)
}

// AddAt is Add with the slot chosen by the caller.
func (b *Bus) AddAt(slot int, f Function) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if slot < 0 || slot >= Slots || b.slots[slot] != nil {
		return fmt.Errorf("pci: there is no free slot %d", slot)
	}
	return b.put(slot, f)
}

// put puts f in a free slot. Preconditions: mu is held.
func (b *Bus) put(slot int, f Function) error {
	e := f.Endpoint()
	next, err := e.place(b.next, b.config.Window)
	if err != nil {
		return err
	}
	b.next = next
	e.attach(b)
	b.slots[slot] = e
	return nil
}

// endpoint returns what sits in a slot, or nil.
func (b *Bus) endpoint(slot int) *Endpoint {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.slots[slot]
}

// newHostBridge makes the function in slot 0: a bridge without registers of
// its own, under the identity that QEMU documents for a generic host bridge.
func newHostBridge() *Endpoint {
	return NewEndpoint(Identity{
		Vendor: 0x1B36, Device: 0x0008,
		SubsystemVendor: 0x1AF4, Subsystem: 0x1100,
		Class: 0x060000,
	})
}
