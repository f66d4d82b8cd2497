package kvm

import (
	"errors"
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VM is a virtual machine's file descriptor.
type VM struct {
	fd      int
	runSize int
}

// Close drops the descriptor; the VM dies with the last of its vCPUs' and its
// own.
func (v *VM) Close() error { return unix.Close(v.fd) }

// CheckExtension returns a capability of this VM (KVM API 4.4).
func (v *VM) CheckExtension(c Capability) int { return checkExtension(v.fd, c) }

// enableCap mirrors struct kvm_enable_cap.
type enableCap struct {
	Cap   uint32
	Flags uint32
	Args  [4]uint64
	_     [64]byte
}

// EnableCap switches a capability on for the VM (KVM API 4.37).
func (v *VM) EnableCap(c Capability, args ...uint64) error {
	e := enableCap{Cap: uint32(c)}
	copy(e.Args[:], args)
	return set("KVM_ENABLE_CAP", v.fd, nrEnableCap, &e)
}

// Memslot is one range of guest-physical memory (struct
// kvm_userspace_memory_region). A Size of 0 deletes the slot.
type Memslot struct {
	Slot  uint32
	Flags uint32
	GPA   uint64
	Size  uint64 // bytes
	HVA   uint64
}

// Memslot flags.
const (
	MemslotLogDirtyPages = 1 << 0
	MemslotReadonly      = 1 << 1
)

// SetMemslot creates, changes or deletes a memslot (KVM API 4.35).
func (v *VM) SetMemslot(m Memslot) error {
	return opError("KVM_SET_USER_MEMORY_REGION", gokvm.SetUserMemoryRegion(uintptr(v.fd), &gokvm.UserspaceMemoryRegion{
		Slot: m.Slot, Flags: m.Flags, GuestPhysAddr: m.GPA, MemorySize: m.Size, UserspaceAddr: m.HVA,
	}))
}

// SetTSSAddr places the three pages Intel's VMX needs (KVM API 4.29).
func (v *VM) SetTSSAddr(gpa uint32) error {
	return opError("KVM_SET_TSS_ADDR", gokvm.SetTSSAddr(uintptr(v.fd), gpa))
}

// SetIdentityMapAddr places the one page of the real-mode identity map (KVM
// API 4.41). gokvm passes 8 bytes of a 4-byte variable, so the call is ours.
func (v *VM) SetIdentityMapAddr(gpa uint64) error {
	return set("KVM_SET_IDENTITY_MAP_ADDR", v.fd, nrSetIdentityMapAddr, &gpa)
}

// CreateIRQChip makes the in-kernel PICs and IOAPIC, and a LAPIC for every vCPU
// created afterwards (KVM API 4.24).
func (v *VM) CreateIRQChip() error {
	return opError("KVM_CREATE_IRQCHIP", gokvm.CreateIRQChip(uintptr(v.fd)))
}

// pitConfig mirrors struct kvm_pit_config.
type pitConfig struct {
	Flags uint32
	_     [15]uint32
}

// CreatePIT makes the in-kernel i8254 and answers port 0x61 (KVM API 4.71 with
// KVM_PIT_SPEAKER_DUMMY, which gokvm's call cannot ask for).
func (v *VM) CreatePIT() error {
	return set("KVM_CREATE_PIT2", v.fd, nrCreatePIT2, &pitConfig{Flags: 1})
}

// IRQChip is the state of one interrupt controller (struct kvm_irqchip).
type IRQChip = gokvm.IRQChip

// The controllers of [VM.IRQChip].
const (
	ChipPICMaster = 0
	ChipPICSlave  = 1
	ChipIOAPIC    = 2
)

// IRQChip reads an interrupt controller (KVM API 4.25).
func (v *VM) IRQChip(id uint32) (IRQChip, error) {
	chip := IRQChip{ChipID: id}
	err := gokvm.GetIRQChip(uintptr(v.fd), &chip)
	return chip, opError("KVM_GET_IRQCHIP", err)
}

// SetIRQChip restores an interrupt controller (KVM API 4.26).
func (v *VM) SetIRQChip(chip IRQChip) error {
	return opError("KVM_SET_IRQCHIP", gokvm.SetIRQChip(uintptr(v.fd), &chip))
}

// PIT is the state of the i8254 (struct kvm_pit_state2).
type PIT = gokvm.PITState2

// PIT reads the timer (KVM API 4.72).
func (v *VM) PIT() (PIT, error) {
	var state PIT
	err := gokvm.GetPIT2(uintptr(v.fd), &state)
	return state, opError("KVM_GET_PIT2", err)
}

// SetPIT restores the timer (KVM API 4.73).
func (v *VM) SetPIT(state PIT) error {
	return opError("KVM_SET_PIT2", gokvm.SetPIT2(uintptr(v.fd), &state))
}

// Clock is kvmclock and what it was read against (struct kvm_clock_data).
type Clock = gokvm.ClockData

// ClockRealtime in the flags of a [Clock] says that Realtime, in nanoseconds
// since 1970, was read together with it (Linux 5.16).
const ClockRealtime = 1 << 2

// Clock reads kvmclock (KVM API 4.29).
func (v *VM) Clock() (Clock, error) {
	var c Clock
	err := gokvm.GetClock(uintptr(v.fd), &c)
	return c, opError("KVM_GET_CLOCK", err)
}

// SetClock sets kvmclock (KVM API 4.30).
func (v *VM) SetClock(c Clock) error {
	return opError("KVM_SET_CLOCK", gokvm.SetClock(uintptr(v.fd), &c))
}

// irqLevel mirrors struct kvm_irq_level.
type irqLevel struct{ IRQ, Level uint32 }

// SetIRQLine drives an interrupt line (KVM API 4.25).
func (v *VM) SetIRQLine(gsi uint32, asserted bool) error {
	l := irqLevel{IRQ: gsi}
	if asserted {
		l.Level = 1
	}
	return set("KVM_IRQ_LINE", v.fd, nrIRQLine, &l)
}

// irqfd mirrors struct kvm_irqfd.
type irqfd struct {
	FD         uint32
	GSI        uint32
	Flags      uint32
	ResampleFD uint32
	_          [16]byte
}

// AssignIRQFD makes writes to the eventfd fd trigger gsi (KVM API 4.75).
func (v *VM) AssignIRQFD(fd int, gsi uint32) error {
	return set("KVM_IRQFD", v.fd, nrIRQFD, &irqfd{FD: uint32(fd), GSI: gsi})
}

// DeassignIRQFD undoes AssignIRQFD.
func (v *VM) DeassignIRQFD(fd int, gsi uint32) error {
	return set("KVM_IRQFD", v.fd, nrIRQFD, &irqfd{FD: uint32(fd), GSI: gsi, Flags: 1})
}

// ioeventfd mirrors struct kvm_ioeventfd.
type ioeventfd struct {
	Datamatch uint64
	Addr      uint64
	Len       uint32
	FD        int32
	Flags     uint32
	_         [36]byte
}

// AssignIOEventFD makes guest writes of size bytes (0 for any) at an MMIO
// address signal fd instead of exiting (KVM API 4.59).
func (v *VM) AssignIOEventFD(gpa uint64, size int, fd int) error {
	return set("KVM_IOEVENTFD", v.fd, nrIOEventFD, &ioeventfd{Addr: gpa, Len: uint32(size), FD: int32(fd)})
}

// DeassignIOEventFD undoes AssignIOEventFD.
func (v *VM) DeassignIOEventFD(gpa uint64, size int, fd int) error {
	return set("KVM_IOEVENTFD", v.fd, nrIOEventFD, &ioeventfd{Addr: gpa, Len: uint32(size), FD: int32(fd), Flags: 1 << 2})
}

// Route is one entry of the interrupt routing table: either a pin of a
// controller or a message (struct kvm_irq_routing_entry).
type Route struct {
	GSI  uint32
	Chip int    // controller of [VM.IRQChip], or -1 for a message
	Pin  uint32 // of the controller

	Address uint64 // of the message
	Data    uint32
}

// routingEntry mirrors struct kvm_irq_routing_entry.
type routingEntry struct {
	GSI   uint32
	Type  uint32
	Flags uint32
	_     uint32
	U     [8]uint32
}

// SetRoutes replaces the whole routing table (KVM API 4.26).
func (v *VM) SetRoutes(routes []Route) error {
	buf := newVariable[routingEntry](len(routes))
	buf.setCount(len(routes))
	entries := buf.entries(len(routes))
	for i, r := range routes {
		if r.Chip >= 0 {
			entries[i] = routingEntry{GSI: r.GSI, Type: 1, U: [8]uint32{uint32(r.Chip), r.Pin}}
		} else {
			entries[i] = routingEntry{GSI: r.GSI, Type: 2, U: [8]uint32{uint32(r.Address), uint32(r.Address >> 32), r.Data}}
		}
	}
	_, err := ioctlPtr("KVM_SET_GSI_ROUTING", v.fd, headerRequest(gokvm.IIOW, nrSetGSIRouting), buf.pointer())
	return err
}

// CreateVCPU makes a vCPU and maps its kvm_run (KVM API 4.7).
func (v *VM) CreateVCPU(id int) (*VCPU, error) {
	fd, err := ioctl("KVM_CREATE_VCPU", v.fd, gokvm.IIO(nrCreateVCPU), uintptr(id))
	if err != nil {
		return nil, fmt.Errorf("vCPU %d: %w", id, err)
	}
	run, err := unix.Mmap(fd, 0, v.runSize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("map kvm_run of vCPU %d: %w", id, err), unix.Close(fd))
	}
	// SAFETY: the kernel's mapping starts with struct kvm_run, page-aligned.
	return &VCPU{fd: fd, runPage: run, run: (*runData)(unsafe.Pointer(&run[0]))}, nil
}

// StatsFD opens the VM's binary statistics (KVM API 4.133).
func (v *VM) StatsFD() (*Stats, error) { return openStats(v.fd) }
