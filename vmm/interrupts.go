package vmm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"sort"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/devices"
	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// interrupts owns the VM's interrupt routing. KVM_SET_GSI_ROUTING replaces the
// whole table, so the pins of the PICs and the IOAPIC are repeated in every
// update and the messages that devices have programmed follow them.
type interrupts struct {
	vm  *kvm.VM
	log *slog.Logger

	mu     sync.Mutex
	routes map[uint32]devices.MSIMessage // by GSI, unmasked messages only
	free   []uint32                      // GSIs given back
	next   uint32                        // lowest GSI never handed out
}

// gsiLimit bounds the GSIs that messages may take: KVM's routing table holds
// 4096 entries (KVM_MAX_IRQ_ROUTES), the pins included.
const gsiLimit = 4096 - 64

// ioapicPins is the number of pins of KVM's IOAPIC.
const ioapicPins = 24

func newInterrupts(vm *kvm.VM, log *slog.Logger) *interrupts {
	return &interrupts{vm: vm, log: log, routes: map[uint32]devices.MSIMessage{}, next: ioapicPins}
}

// line is a pin of the PICs and the IOAPIC.
type line struct {
	vm  *kvm.VM
	gsi uint32
	log *slog.Logger
}

// Line returns the level-triggered line of a GSI below 24.
func (i *interrupts) Line(gsi uint32) devices.Line { return &line{i.vm, gsi, i.log} }

// SetLevel implements [devices.Line].
func (l *line) SetLevel(asserted bool) {
	if err := l.vm.SetIRQLine(l.gsi, asserted); err != nil {
		l.log.Error("cannot drive an interrupt line", "gsi", l.gsi, "err", err)
	}
}

// msi is one message-signalled interrupt: an eventfd bound to a GSI.
type msi struct {
	fd  int
	gsi uint32
}

var eventOne = binary.NativeEndian.AppendUint64(nil, 1)

// Trigger implements [devices.MSI]. A full eventfd means that an interrupt is
// already on its way, so EAGAIN is no loss.
func (m *msi) Trigger() { _, _ = unix.Write(m.fd, eventOne) }

// FD implements [devices.MSI].
func (m *msi) FD() int { return m.fd }

// AllocateMSIs implements [devices.MSIAllocator].
func (i *interrupts) AllocateMSIs(n int) ([]devices.MSI, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	msis := make([]devices.MSI, 0, n)
	for range n {
		m, err := i.allocate()
		if err != nil {
			i.release(msis)
			return nil, fmt.Errorf("allocate an interrupt: %w", err)
		}
		msis = append(msis, m)
	}
	return msis, nil
}

// allocate takes a GSI and binds an eventfd to it. Preconditions: mu is held.
func (i *interrupts) allocate() (*msi, error) {
	gsi := i.next
	if n := len(i.free); n > 0 {
		gsi = i.free[n-1]
	} else if gsi >= gsiLimit {
		return nil, fmt.Errorf("all %d message interrupts are in use", gsiLimit-ioapicPins)
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	if err := i.vm.AssignIRQFD(fd, gsi); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	if n := len(i.free); n > 0 {
		i.free = i.free[:n-1]
	} else {
		i.next++
	}
	return &msi{fd: fd, gsi: gsi}, nil
}

// RouteMSIs implements [devices.MSIAllocator].
func (i *interrupts) RouteMSIs(msis []devices.MSI, messages []devices.MSIMessage) error {
	if len(msis) != len(messages) {
		return fmt.Errorf("%d interrupts and %d messages: %w", len(msis), len(messages), unix.EINVAL)
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	changed := false
	for n, d := range msis {
		m, ok := d.(*msi)
		if !ok {
			return fmt.Errorf("an interrupt of another allocator: %w", unix.EINVAL)
		}
		old, routed := i.routes[m.gsi]
		switch {
		case messages[n].Masked && routed:
			delete(i.routes, m.gsi)
			changed = true
		case !messages[n].Masked && (!routed || old != messages[n]):
			i.routes[m.gsi] = messages[n]
			changed = true
		}
	}
	if !changed {
		return nil
	}
	return i.install()
}

// FreeMSIs implements [devices.MSIAllocator].
func (i *interrupts) FreeMSIs(msis []devices.MSI) {
	i.mu.Lock()
	defer i.mu.Unlock()
	i.release(msis)
	if err := i.install(); err != nil {
		i.log.Error("cannot update the interrupt routes", "err", err)
	}
}

// release unbinds and closes. Preconditions: mu is held.
func (i *interrupts) release(msis []devices.MSI) {
	for _, d := range msis {
		m, ok := d.(*msi)
		if !ok {
			continue
		}
		if err := errors.Join(i.vm.DeassignIRQFD(m.fd, m.gsi), unix.Close(m.fd)); err != nil {
			i.log.Error("cannot release an interrupt", "gsi", m.gsi, "err", err)
		}
		delete(i.routes, m.gsi)
		i.free = append(i.free, m.gsi)
	}
}

// installPins routes the pins before any message is.
func (i *interrupts) installPins() error {
	i.mu.Lock()
	defer i.mu.Unlock()
	return i.install()
}

// install replaces the kernel's table: the pins as KVM sets them up by default,
// then the messages. Preconditions: mu is held.
func (i *interrupts) install() error {
	table := make([]kvm.Route, 0, 16+ioapicPins+len(i.routes))
	for gsi := uint32(0); gsi < ioapicPins; gsi++ {
		switch {
		case gsi == 2: // the cascade of the second PIC
		case gsi < 8:
			table = append(table, kvm.Route{GSI: gsi, Chip: kvm.ChipPICMaster, Pin: gsi})
		case gsi < 16:
			table = append(table, kvm.Route{GSI: gsi, Chip: kvm.ChipPICSlave, Pin: gsi - 8})
		}
		pin := gsi
		if gsi == 0 {
			pin = 2 // the PIT's line, as the MADT's override says
		}
		if gsi != 2 {
			table = append(table, kvm.Route{GSI: gsi, Chip: kvm.ChipIOAPIC, Pin: pin})
		}
	}
	gsis := make([]uint32, 0, len(i.routes))
	for gsi := range i.routes {
		gsis = append(gsis, gsi)
	}
	sort.Slice(gsis, func(a, b int) bool { return gsis[a] < gsis[b] })
	for _, gsi := range gsis {
		m := i.routes[gsi]
		table = append(table, kvm.Route{GSI: gsi, Chip: -1, Address: m.Address, Data: m.Data})
	}
	return i.vm.SetRoutes(table)
}

// doorbells connects queue notifications to eventfds.
type doorbells struct {
	vm *kvm.VM
}

// AddDoorbell implements [devices.Doorbells].
func (d *doorbells) AddDoorbell(addr memory.GPA, size int, fd int) error {
	if err := d.vm.AssignIOEventFD(uint64(addr), size, fd); err != nil {
		return fmt.Errorf("doorbell at %s: %w", addr, err)
	}
	return nil
}

// RemoveDoorbell implements [devices.Doorbells].
func (d *doorbells) RemoveDoorbell(addr memory.GPA, size int, fd int) error {
	if err := d.vm.DeassignIOEventFD(uint64(addr), size, fd); err != nil {
		return fmt.Errorf("doorbell at %s: %w", addr, err)
	}
	return nil
}
