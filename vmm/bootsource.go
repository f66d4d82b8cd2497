package vmm

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"ditto.vm/devices/i8042"
	"ditto.vm/guest/acpi"
	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// PayloadPrefix marks a kernel that is not a file but one of ditto's bare-metal
// programs, as in "payload:hello".
const PayloadPrefix = "payload:"

// bootSource is what a machine boots, kept open so that a restart can load it
// again after the process has dropped its rights.
type bootSource struct {
	kernel, initrd *boot.Image
	program        *payload.Program
	cmdline        string
	// missing is why kernel or initrd cannot be loaded.
	missing error
}

// openSource opens the kernel and initrd that cfg names by path. When they cannot
// be opened, the source says so too.
func openSource(cfg *config.Config, closers *closers) (bootSource, error) {
	if spec, ok := strings.CutPrefix(cfg.Kernel, PayloadPrefix); ok {
		program, err := payload.Parse(spec)
		if err != nil {
			return bootSource{}, fmt.Errorf("kernel %q: %w: %w", cfg.Kernel, boot.ErrNotKernel, err)
		}
		return bootSource{program: program}, nil
	}
	s := bootSource{cmdline: commandLine(cfg)}
	var err error
	if s.kernel, err = boot.OpenImage(cfg.Kernel); err != nil {
		err = fmt.Errorf("kernel: %w", err)
		return bootSource{cmdline: s.cmdline, missing: err}, err
	}
	closers.add(s.kernel.Close)
	if cfg.Initrd != "" && cfg.Initrd != config.InitrdNone {
		if s.initrd, err = boot.OpenImage(cfg.Initrd); err != nil {
			s.missing = fmt.Errorf("initrd: %w", err)
			return s, s.missing
		}
		closers.add(s.initrd.Close)
	}
	return s, nil
}

// commandLine is what the kernel is told: ditto's own words unless they are
// replaced, then the user's.
func commandLine(cfg *config.Config) string {
	words := cfg.Cmdline.Replace
	if words == "" {
		words = "console=ttyS0 quiet"
		if cfg.Console == config.ConsoleVirtio {
			words = "console=hvc0 quiet"
		}
	}
	return strings.TrimSpace(words + " " + cfg.Cmdline.Append)
}

// load puts the boot image and the ACPI tables into memory and sets the first
// vCPU to the image's entry. Preconditions: vCPU threads are paused or not
// started.
func (m *VM) load() error {
	if m.source.missing != nil {
		return fmt.Errorf("what it boots was not there when it was restored: %w", m.source.missing)
	}
	var loaded *boot.Loaded
	var err error
	if m.source.program != nil {
		loaded, err = m.loadProgram()
	} else {
		loaded, err = m.loadKernel()
	}
	if err != nil {
		return err
	}
	m.loaded = loaded
	m.background.loaded = loaded.Segments
	first := m.vcpus[0]
	enter := func() error { return enterGuest(first.kvm, loaded.Entry) }
	if m.state == api.Created {
		return enter()
	}
	return first.do(context.Background(), enter)
}

// loadProgram loads a bare-metal program, which may want to know how fast its
// time-stamp counter runs. Without an answer it counts in cycles.
func (m *VM) loadProgram() (*boot.Loaded, error) {
	if khz, err := m.vcpus[0].kvm.TSCKHz(); err == nil {
		m.source.program.TSCHz = khz * 1000
	}
	return m.source.program.Load(m.mem)
}

func (m *VM) loadKernel() (*boot.Loaded, error) {
	tables, err := acpi.Build(m.acpiConfig())
	if err != nil {
		return nil, fmt.Errorf("ACPI tables: %w", err)
	}
	if err := tables.Write(m.mem); err != nil {
		return nil, fmt.Errorf("ACPI tables: %w", err)
	}
	// Linux on hardware-reduced ACPI wants to reboot by EFI, and without it
	// jumps to the reset vector.
	if err := m.mem.WriteAt(i8042.ResetVector(), i8042.ResetVectorAddress); err != nil {
		return nil, fmt.Errorf("reset vector: %w", err)
	}
	return boot.Load(m.mem, boot.Config{
		Kernel:  m.source.kernel,
		Initrd:  m.source.initrd,
		Cmdline: m.source.cmdline,
		RSDP:    tables.RSDP,
		Reserved: []memory.Range{
			{Start: ecamBase, Size: ecamSize},
			{Start: gedBase, Size: memory.PageSize},
		},
	})
}

// enterGuest sets the registers that a boot protocol prescribes. The rest is as
// after a reset.
func enterGuest(c *kvm.VCPU, e boot.Entry) error {
	sregs, err := c.Sregs()
	if err != nil {
		return err
	}
	data := segment(e.Data)
	sregs.CS = segment(e.CS)
	sregs.DS, sregs.ES, sregs.FS, sregs.GS, sregs.SS = data, data, data, data, data
	sregs.TR, sregs.LDT = segment(e.TR), segment(e.LDT)
	sregs.GDT = kvm.Descriptor{Base: e.GDT.Base, Limit: e.GDT.Limit}
	sregs.IDT = kvm.Descriptor{Base: e.IDT.Base, Limit: e.IDT.Limit}
	sregs.CR0, sregs.CR3, sregs.CR4, sregs.EFER = e.CR0, e.CR3, e.CR4, e.EFER
	return errors.Join(c.SetSregs(sregs), c.SetRegs(kvm.Regs{
		RIP: e.RIP, RSP: e.RSP, RBX: e.RBX, RSI: e.RSI, RDI: e.RDI, RFLAGS: e.RFLAGS | 2,
	}))
}

// segment converts a segment register to KVM's form.
func segment(s boot.Segment) kvm.Segment {
	bit := func(b bool) uint8 {
		if b {
			return 1
		}
		return 0
	}
	return kvm.Segment{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type, DPL: s.DPL,
		Present: bit(s.Present), DB: bit(s.DB), S: bit(s.S), L: bit(s.L), G: bit(s.G),
		Unusable: bit(!s.Present),
	}
}
