package kvm

import (
	"errors"
	"runtime"
	"sync/atomic"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// VCPU is a vCPU's descriptor and its shared kvm_run page.
type VCPU struct {
	fd      int
	runPage []byte
	run     *runData
}

// runData mirrors the head of struct kvm_run; data is its union of exits.
type runData struct {
	RequestInterruptWindow uint8
	ImmediateExit          uint8 // shared with other threads: see SetImmediateExit
	_                      [6]uint8
	ExitReason             uint32
	ReadyForInjection      uint8
	IFFlag                 uint8
	Flags                  uint16
	CR8                    uint64
	APICBase               uint64
	data                   [256]byte
}

// Close unmaps kvm_run and closes the descriptor.
func (c *VCPU) Close() error {
	err := unix.Munmap(c.runPage)
	c.run, c.runPage = nil, nil
	return errors.Join(err, unix.Close(c.fd))
}

// ErrInterrupted is returned by Run when a signal or immediate_exit ended it.
var ErrInterrupted = errors.New("KVM_RUN interrupted")

// Run enters the guest until the next exit (KVM API 4.10). The I/O or MMIO
// exit before is completed first, even when the call is then interrupted.
func (c *VCPU) Run() error {
	// The scheduler must know that this thread is away, so not RawSyscall.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(c.fd), gokvm.IIO(nrRun), 0)
	switch errno {
	case 0:
		return nil
	case unix.EINTR, unix.EAGAIN:
		return ErrInterrupted
	default:
		return &OpError{Op: "KVM_RUN", Err: errno}
	}
}

// SetImmediateExit makes the current or next Run return ErrInterrupted, or
// allows it to proceed. It alone does not wake a halted vCPU. Safe from any
// thread.
func (c *VCPU) SetImmediateExit(on bool) {
	// Go has no atomic byte: the word that holds the flag is changed as a
	// whole. Its other bytes are padding and request_interrupt_window, which
	// is unused with an in-kernel irqchip.
	var word uint32
	if on {
		word = 1 << 8
	}
	// SAFETY: kvm_run is page-aligned, so its first word is aligned.
	atomic.StoreUint32((*uint32)(unsafe.Pointer(c.run)), word)
}

// ExitReason returns why the last Run returned.
func (c *VCPU) ExitReason() ExitReason { return ExitReason(c.run.ExitReason) }

// IOExit is a port access (KVM_EXIT_IO). Data aliases kvm_run: count items of
// size bytes, to be written for an In and read for an Out before the next Run.
type IOExit struct {
	Out  bool
	Port uint16
	Size int
	Data []byte
}

// IO decodes an ExitIO.
func (c *VCPU) IO() IOExit {
	d := c.run.data[:]
	size := int(d[1])
	count := int(le32(d[4:]))
	offset := le64(d[8:])
	return IOExit{
		Out:  d[0] == gokvm.EXITIOOUT,
		Port: uint16(d[2]) | uint16(d[3])<<8,
		Size: size,
		Data: c.runPage[offset : offset+uint64(size*count)],
	}
}

// MMIOExit is an access outside every memslot (KVM_EXIT_MMIO). Data aliases
// kvm_run.
type MMIOExit struct {
	Write bool
	GPA   uint64
	Data  []byte
}

// MMIO decodes an ExitMMIO.
func (c *VCPU) MMIO() MMIOExit {
	d := c.run.data[:]
	n := min(le32(d[16:]), 8)
	return MMIOExit{Write: d[20] != 0, GPA: le64(d), Data: d[8 : 8+n : 8+n]}
}

// InternalError decodes an ExitInternalError: the suberror and its data.
func (c *VCPU) InternalError() (suberror uint32, data []uint64) {
	d := c.run.data[:]
	n := min(le32(d[4:]), 16)
	for i := range n {
		data = append(data, le64(d[8+8*i:]))
	}
	return le32(d), data
}

// FailEntry decodes an ExitFailEntry: the hardware's reason.
func (c *VCPU) FailEntry() uint64 { return le64(c.run.data[:]) }

// SystemEvent decodes an ExitSystemEvent: shutdown 1, reset 2, crash 3.
func (c *VCPU) SystemEvent() uint32 { return le32(c.run.data[:]) }

// MemoryFault decodes an ExitMemoryFault.
func (c *VCPU) MemoryFault() (flags, gpa, size uint64) {
	d := c.run.data[:]
	return le64(d), le64(d[8:]), le64(d[16:])
}

func le32(b []byte) uint32 {
	return uint32(b[0]) | uint32(b[1])<<8 | uint32(b[2])<<16 | uint32(b[3])<<24
}
func le64(b []byte) uint64 { return uint64(le32(b)) | uint64(le32(b[4:]))<<32 }

// The kernel's structures, as gokvm has them.
type (
	// Regs are the general registers (KVM API 4.11).
	Regs = gokvm.Regs
	// Sregs are the special registers (KVM API 4.13).
	Sregs = gokvm.Sregs
	// Segment is a segment register of Sregs.
	Segment = gokvm.Segment
	// Descriptor is a descriptor table of Sregs.
	Descriptor = gokvm.Descriptor
	// DebugRegs are the debug registers (KVM API 4.33).
	DebugRegs = gokvm.DebugRegs
	// XCRS are the extended control registers (KVM API 4.44).
	XCRS = gokvm.XCRS
	// MPState is the multiprocessing state (KVM API 4.38).
	MPState = gokvm.MPState
	// Events are pending exceptions and interrupts (KVM API 4.31).
	Events = gokvm.VCPUEvents
	// LAPIC is the local APIC's register page (KVM API 4.57).
	LAPIC = gokvm.LAPICState
)

// Multiprocessing states of x86 (KVM API 4.38), in their order.
const (
	MPStateRunnable      = gokvm.MPStateRunnable
	MPStateUninitialized = gokvm.MPStateUninitialized
	MPStateHalted        = gokvm.MPStateHalted
	MPStateSIPIReceived  = gokvm.MPStateSipiReceived // the last
)

// Regs reads the general registers (KVM API 4.11).
func (c *VCPU) Regs() (Regs, error) {
	r, err := gokvm.GetRegs(uintptr(c.fd))
	if err != nil {
		return Regs{}, opError("KVM_GET_REGS", err)
	}
	return *r, nil
}

// SetRegs writes the general registers (KVM API 4.12).
func (c *VCPU) SetRegs(r Regs) error {
	return opError("KVM_SET_REGS", gokvm.SetRegs(uintptr(c.fd), &r))
}

// Sregs reads segments, control registers and the APIC base (KVM API 4.13).
func (c *VCPU) Sregs() (Sregs, error) {
	r, err := gokvm.GetSregs(uintptr(c.fd))
	if err != nil {
		return Sregs{}, opError("KVM_GET_SREGS", err)
	}
	return *r, nil
}

// SetSregs writes them (KVM API 4.14).
func (c *VCPU) SetSregs(r Sregs) error {
	return opError("KVM_SET_SREGS", gokvm.SetSregs(uintptr(c.fd), &r))
}

// DebugRegs reads DR0 to DR7 (KVM API 4.33).
func (c *VCPU) DebugRegs() (DebugRegs, error) {
	var d DebugRegs
	err := gokvm.GetDebugRegs(uintptr(c.fd), &d)
	return d, opError("KVM_GET_DEBUGREGS", err)
}

// SetDebugRegs writes DR0 to DR7 (KVM API 4.34).
func (c *VCPU) SetDebugRegs(d DebugRegs) error {
	return opError("KVM_SET_DEBUGREGS", gokvm.SetDebugRegs(uintptr(c.fd), &d))
}

// XCRS reads the extended control registers (KVM API 4.44).
func (c *VCPU) XCRS() (XCRS, error) {
	var x XCRS
	err := gokvm.GetXCRS(uintptr(c.fd), &x)
	return x, opError("KVM_GET_XCRS", err)
}

// SetXCRS writes them (KVM API 4.45).
func (c *VCPU) SetXCRS(x XCRS) error {
	return opError("KVM_SET_XCRS", gokvm.SetXCRS(uintptr(c.fd), &x))
}

// xsaveSize is the legacy size of struct kvm_xsave, in bytes. Larger states
// exist only for features that are granted to the process on request (AMX).
const xsaveSize = 4096

// XSAVE reads FPU, SSE, AVX and further state (KVM API 4.42).
func (c *VCPU) XSAVE() ([]byte, error) {
	v, err := get[[xsaveSize]byte]("KVM_GET_XSAVE", c.fd, nrGetXSAVE)
	return v[:], err
}

// SetXSAVE restores it (KVM API 4.43).
func (c *VCPU) SetXSAVE(state []byte) error {
	var v [xsaveSize]byte
	if len(state) != len(v) {
		return opError("KVM_SET_XSAVE", unix.EINVAL)
	}
	copy(v[:], state)
	return set("KVM_SET_XSAVE", c.fd, nrSetXSAVE, &v)
}

// LAPIC reads the local APIC's registers (KVM API 4.57).
func (c *VCPU) LAPIC() (LAPIC, error) {
	var l LAPIC
	err := gokvm.GetLocalAPIC(uintptr(c.fd), &l)
	return l, opError("KVM_GET_LAPIC", err)
}

// SetLAPIC writes them (KVM API 4.58).
func (c *VCPU) SetLAPIC(l LAPIC) error {
	return opError("KVM_SET_LAPIC", gokvm.SetLocalAPIC(uintptr(c.fd), &l))
}

// MPState reads whether the vCPU runs, halts or waits to be started (KVM API
// 4.38).
func (c *VCPU) MPState() (uint32, error) {
	var m MPState
	err := gokvm.GetMPState(uintptr(c.fd), &m)
	return m.State, opError("KVM_GET_MP_STATE", err)
}

// SetMPState writes it (KVM API 4.39).
func (c *VCPU) SetMPState(state uint32) error {
	return opError("KVM_SET_MP_STATE", gokvm.SetMPState(uintptr(c.fd), &MPState{State: state}))
}

// Events reads pending exceptions, interrupts and NMIs (KVM API 4.31).
func (c *VCPU) Events() (Events, error) {
	var e Events
	err := gokvm.GetVCPUEvents(uintptr(c.fd), &e)
	return e, opError("KVM_GET_VCPU_EVENTS", err)
}

// SetEvents writes them (KVM API 4.32).
func (c *VCPU) SetEvents(e Events) error {
	return opError("KVM_SET_VCPU_EVENTS", gokvm.SetVCPUEvents(uintptr(c.fd), &e))
}

// NMI injects a non-maskable interrupt (KVM API 4.64).
func (c *VCPU) NMI() error {
	_, err := ioctl("KVM_NMI", c.fd, gokvm.IIO(nrNMI), 0)
	return err
}

// TSCKHz returns the frequency of the guest's time-stamp counter (KVM API 4.56).
func (c *VCPU) TSCKHz() (uint64, error) {
	v, err := gokvm.GetTSCKHz(uintptr(c.fd))
	return v, opError("KVM_GET_TSC_KHZ", err)
}

// SetTSCKHz sets it (KVM API 4.55). Where KVM cannot scale the counter, only a
// frequency that is all but the host's own is taken.
func (c *VCPU) SetTSCKHz(khz uint64) error {
	return opError("KVM_SET_TSC_KHZ", gokvm.SetTSCKHz(uintptr(c.fd), khz))
}

// deviceAttr mirrors struct kvm_device_attr. Group and attribute are those of the
// offset of the time-stamp counter: KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET.
type deviceAttr struct {
	Flags, Group uint32
	Attr         uint64
	Addr         uint64
}

// TSCOffset returns what the guest's time-stamp counter is ahead of the host's,
// the host's scaled to the guest's frequency (KVM vCPU attributes 4.1, Linux
// 5.16). It wraps.
func (c *VCPU) TSCOffset() (uint64, error) {
	v := new(uint64)
	err := c.tscOffset("KVM_GET_DEVICE_ATTR", nrGetDeviceAttr, v)
	return *v, err
}

// SetTSCOffset sets it. Unlike a write of IA32_TSC it is exact: KVM takes a value
// that is within a second of what it expects for one that was meant to be that.
func (c *VCPU) SetTSCOffset(offset uint64) error {
	return c.tscOffset("KVM_SET_DEVICE_ATTR", nrSetDeviceAttr, &offset)
}

func (c *VCPU) tscOffset(op string, nr uintptr, v *uint64) error {
	var pin runtime.Pinner
	defer pin.Unpin()
	// SAFETY: KVM gets the address as a number, so v is kept where it is.
	pin.Pin(v)
	return set(op, c.fd, nr, &deviceAttr{Addr: uint64(uintptr(unsafe.Pointer(v)))})
}

// KVMClockCtrl tells the guest's watchdogs that it was paused (KVM API 4.70).
// EINVAL, when the guest has no kvmclock, is not an error.
func (c *VCPU) KVMClockCtrl() error {
	_, err := ioctl("KVM_KVMCLOCK_CTRL", c.fd, gokvm.IIO(nrKVMClockCtrl), 0)
	if errors.Is(err, unix.EINVAL) {
		return nil
	}
	return err
}
