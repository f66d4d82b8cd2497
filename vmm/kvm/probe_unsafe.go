package kvm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Linux says whether a KVM can run an unmodified Linux kernel, and why not.
type Linux struct {
	OK     bool
	Reason string // empty when OK
}

// Where the probe's few bytes lie in its one mebibyte of guest memory.
const (
	probeMemory  = 1 << 20
	probeTables  = 0x1000
	probeOperand = 0x8000
	probeCode    = 0x9000
	probePort    = 0xf4
)

// probeProgram runs at CPL 0 in long mode. Some KVMs (PVM without hardware
// virtualization) run supervisor code in KVM's instruction emulator, which
// knows only a part of the instruction set: Linux dies there at its first
// cmpxchg16b. A KVM that executes supervisor code in hardware, or a complete
// emulation of such hardware, reaches the out.
var probeProgram = []byte{
	0xbf, 0x00, 0x80, 0x00, 0x00, // mov edi, probeOperand
	0xf0, 0x48, 0x0f, 0xc7, 0x0f, // lock cmpxchg16b [rdi]
	0xb0, 0x01, // mov al, 1
	0xe6, probePort, // out probePort, al
	0xf4, // hlt
}

// ProbeLinux runs a few supervisor instructions in a throw-away VM, in about a
// millisecond.
func (s *System) ProbeLinux() (Linux, error) {
	vm, err := s.CreateVM()
	if err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	defer vm.Close()
	mem, err := unix.Mmap(-1, 0, probeMemory, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: map memory: %w", err)
	}
	defer func() { _ = unix.Munmap(mem) }()

	// PML4 -> PDPT -> one 2 MiB page at 0.
	binary.LittleEndian.PutUint64(mem[probeTables:], probeTables+0x1000|3)
	binary.LittleEndian.PutUint64(mem[probeTables+0x1000:], probeTables+0x2000|3)
	binary.LittleEndian.PutUint64(mem[probeTables+0x2000:], 0x83)
	copy(mem[probeCode:], probeProgram)
	// SAFETY: mem outlives the VM, which is closed first.
	if err := vm.SetMemslot(Memslot{Size: probeMemory, HVA: uint64(uintptr(unsafe.Pointer(&mem[0])))}); err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	defer vcpu.Close()
	cpuid, err := s.SupportedCPUID()
	if err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	// Without a CPUID the CPU has no long mode and refuses its registers.
	if err := vcpu.SetCPUID(cpuid); err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	if err := vcpu.enterProbe(); err != nil {
		return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
	}
	for {
		switch err := vcpu.Run(); {
		case errors.Is(err, ErrInterrupted):
			continue
		case err != nil:
			return Linux{}, fmt.Errorf("probe whether Linux runs: %w", err)
		}
		if reason := vcpu.ExitReason(); reason != ExitIO {
			return Linux{Reason: fmt.Sprintf("this KVM cannot execute supervisor code (exit %q at cmpxchg16b): it has no VT-x or AMD-V below it", reason)}, nil
		}
		return Linux{OK: true}, nil
	}
}

// enterProbe sets 64-bit supervisor mode at the program's first instruction.
func (c *VCPU) enterProbe() error {
	sregs, err := c.Sregs()
	if err != nil {
		return err
	}
	code := Segment{Limit: 0xffffffff, Selector: 8, Typ: 0xb, Present: 1, S: 1, L: 1, G: 1}
	data := Segment{Limit: 0xffffffff, Selector: 16, Typ: 3, Present: 1, S: 1, DB: 1, G: 1}
	sregs.CS = code
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.CR3 = probeTables
	sregs.CR4 = 1 << 5           // PAE
	sregs.CR0 = 1<<31 | 1<<5 | 1 // PG, NE, PE
	sregs.EFER = 1<<10 | 1<<8    // LMA, LME
	if err := c.SetSregs(sregs); err != nil {
		return err
	}
	return c.SetRegs(Regs{RIP: probeCode, RSP: probeCode, RFLAGS: 2})
}
