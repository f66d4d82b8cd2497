package devices

import "ditto.vm/memory"

// Line is a level-triggered interrupt line, a GSI of the interrupt controller.
type Line interface {
	// SetLevel asserts or deasserts the line. It is safe from any goroutine
	// and never blocks on the guest.
	SetLevel(asserted bool)
}

// MSI is one message-signalled interrupt: an irqfd whose route is the address
// and data that the guest programmed (PCI 3.0 6.8, virtio 1.2 4.1.5.1.2).
type MSI interface {
	// Trigger delivers the interrupt once. It is dropped while the message
	// is masked or was never routed. Safe from any goroutine.
	Trigger()
	// FD is the irqfd: writing 8 bytes to it is the same as Trigger, without
	// passing through the VMM.
	FD() int
}

// MSIMessage is what an MSI-X table entry says.
type MSIMessage struct {
	Address uint64
	Data    uint32
	Masked  bool
}

// MSIAllocator hands out message-signalled interrupts and routes them.
type MSIAllocator interface {
	// AllocateMSIs reserves n interrupts, all masked. The device keeps them
	// for its lifetime.
	AllocateMSIs(n int) ([]MSI, error)
	// RouteMSIs programs several messages in one update of the routing
	// table, which is replaced as a whole (KVM API 4.24). msis[i] gets
	// messages[i].
	RouteMSIs(msis []MSI, messages []MSIMessage) error
	// FreeMSIs closes the irqfds and gives their routes back.
	FreeMSIs(msis []MSI)
}

// Doorbells connects guest writes to eventfds inside the kernel (KVM API
// 4.59), so that a queue notification costs no exit to the VMM.
type Doorbells interface {
	// AddDoorbell makes a guest MMIO write of size bytes at addr signal fd
	// instead of reaching the bus. size 0 matches any length.
	AddDoorbell(addr memory.GPA, size int, fd int) error
	// RemoveDoorbell undoes AddDoorbell with the same arguments.
	RemoveDoorbell(addr memory.GPA, size int, fd int) error
}
