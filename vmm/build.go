package vmm

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"

	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// Errors of [New] that a caller tells apart.
var (
	// ErrNoLinux: this KVM can run payloads, but no Linux kernel.
	ErrNoLinux = errors.New("this KVM cannot run Linux")
	// ErrNoMemory: guest memory of the kind asked for cannot be had.
	ErrNoMemory = errors.New("guest memory cannot be had")
)

// New makes a VM from cfg, whose kernel and initrd are paths. Everything that
// needs rights is opened here: the caller may drop them before [VM.Start].
// ctx bounds the making only.
func New(ctx context.Context, cfg config.Config, opts Options) (*VM, error) {
	m := prepare(cfg, opts)
	if err := m.build(ctx, opts); err != nil {
		return nil, errors.Join(err, m.cleanup.close())
	}
	return m, nil
}

// prepare makes a VM of which nothing is built.
func prepare(cfg config.Config, opts Options) *VM {
	m := &VM{
		cfg: cfg, version: opts.Version, log: opts.Log, state: api.Created, handed: opts.Handed,
		requests: make(chan request, 1),
		ended:    make(chan struct{}),
	}
	if m.log == nil {
		m.log = slog.New(slog.DiscardHandler)
	}
	m.log = m.log.With("vm", cfg.Name)
	return m
}

func (m *VM) build(ctx context.Context, opts Options) error {
	var err error
	// What is cheap to get wrong comes first.
	if m.source, err = openSource(&m.cfg, &m.cleanup); err != nil {
		// A guest that runs already needs what it booted when it boots again.
		if m.saved == nil || m.source.missing == nil {
			return err
		}
		m.log.Warn("the guest cannot restart: what it boots is not there", "err", err)
	}
	if m.sys, err = kvm.Open(); err != nil {
		return err
	}
	m.cleanup.add(m.sys.Close)
	if m.source.program == nil {
		linux, err := m.sys.ProbeLinux()
		if err != nil {
			return err
		}
		if !linux.OK {
			return fmt.Errorf("%w: %s; use a host with VT-x or AMD-V, or nested virtualization switched on", ErrNoLinux, linux.Reason)
		}
	}
	if err := m.addMemory(); err != nil {
		return err
	}
	if err := m.createVM(); err != nil {
		return err
	}
	if err := m.addPlatform(opts.Console); err != nil {
		return err
	}
	if err := m.addVCPUs(); err != nil {
		return err
	}
	if err := m.addTracker(); err != nil {
		return err
	}
	if err := m.addPCI(ctx, opts); err != nil {
		return err
	}
	m.enoughProcs()
	return nil
}

// enoughProcs leaves the runtime enough Ps: threads inside short system calls
// keep theirs for a while, and its poller and the workers would starve.
func (m *VM) enoughProcs() {
	workers := m.pci.threads + 2
	if m.restored != nil || m.pulled != nil {
		workers++ // who fetches missing pages
	}
	if want := len(m.vcpus) + workers; runtime.GOMAXPROCS(0) < want {
		runtime.GOMAXPROCS(want)
	}
}

// addMemory maps guest RAM, and fills that of a restored VM before anything
// touches it.
func (m *VM) addMemory() error {
	var err error
	if m.mem, err = m.openMemory(); err != nil {
		return fmt.Errorf("%w: %w", ErrNoMemory, err)
	}
	m.cleanup.add(m.mem.Close)
	if m.saved != nil {
		if err := m.saved.fill(m); err != nil {
			return fmt.Errorf("fill guest memory: %w", err)
		}
	}
	return nil
}

// createVM makes the KVM VM with its memslots, interrupt controllers and timer.
func (m *VM) createVM() error {
	var err error
	if m.kvm, err = m.sys.CreateVM(); err != nil {
		return err
	}
	m.cleanup.add(m.kvm.Close)
	for _, r := range m.mem.Regions() {
		err := m.kvm.SetMemslot(kvm.Memslot{Slot: r.Slot, GPA: uint64(r.Start), Size: r.Size, HVA: uint64(r.HVA)})
		if err != nil {
			return fmt.Errorf("memslot at %s: %w", r.Start, err)
		}
	}
	if err := m.kvm.SetIdentityMapAddr(identityMapBase); err != nil {
		return err
	}
	if err := m.kvm.SetTSSAddr(tssBase); err != nil {
		return err
	}
	if err := m.kvm.CreateIRQChip(); err != nil {
		return err
	}
	if err := m.kvm.CreatePIT(); err != nil {
		return err
	}
	m.irqs = newInterrupts(m.kvm, m.log)
	if err := m.irqs.installPins(); err != nil {
		return err
	}
	if m.stats, err = m.kvm.StatsFD(); err != nil {
		m.log.Warn("no KVM statistics: page sizes of guest memory are unknown", "err", err)
		m.stats = nil
		return nil
	}
	m.cleanup.add(m.stats.Close)
	return nil
}

// addVCPUs makes the vCPUs with their CPUID and power-on registers.
func (m *VM) addVCPUs() error {
	limit := m.sys.CheckExtension(kvm.CapMaxVCPUs)
	if m.cfg.CPUs > limit {
		return fmt.Errorf("%d vCPUs: this KVM allows %d", m.cfg.CPUs, limit)
	}
	supported, err := m.sys.SupportedCPUID()
	if err != nil {
		return err
	}
	if m.msrIndices, err = m.sys.MSRIndices(); err != nil {
		return err
	}
	if err := m.enableRings(); err != nil {
		return err
	}
	m.cpuid = guestCPUID(supported, m.cfg.CPUs, m.sys.CheckExtension(kvm.CapTSCDeadlineTimer) != 0)
	if m.saved != nil {
		// What it was started with is in its state.
		m.cpuid, err = m.saved.prepareCPUs(m.cpuid, m.msrIndices)
	} else {
		m.cpuid, err = chooseCPU(m.cpuid, m.cfg.CPU)
	}
	if err != nil {
		return err
	}
	for id := range m.cfg.CPUs {
		k, err := m.kvm.CreateVCPU(id)
		if err != nil {
			return err
		}
		m.cleanup.add(k.Close)
		if m.saved != nil {
			if err := m.saved.setTSCKHz(k); err != nil {
				return fmt.Errorf("vCPU %d: %w", id, err)
			}
		}
		if err := initVCPU(k, vcpuCPUID(m.cpuid, id)); err != nil {
			return fmt.Errorf("vCPU %d: %w", id, err)
		}
		m.vcpus = append(m.vcpus, newVCPU(id, k, m))
	}
	return m.captureReset()
}

// Values a firmware would have left behind.
const (
	miscEnableFastString = 1
	mtrrEnableWriteBack  = 1<<11 | 6
)

// initVCPU does what firmware does to a CPU: memory types default to
// write-back, string instructions are fast, and the legacy interrupt lines
// reach the local APIC (MultiProcessor Specification 1.4, 3.6.2.2).
func initVCPU(c *kvm.VCPU, cpuid []kvm.CPUIDEntry) error {
	if err := c.SetCPUID(cpuid); err != nil {
		return err
	}
	if err := setMSRs(c, []kvm.MSR{
		{Index: msrMiscEnable, Value: miscEnableFastString},
		{Index: msrMTRRDefType, Value: mtrrEnableWriteBack},
	}); err != nil {
		return err
	}
	lapic, err := c.LAPIC()
	if err != nil {
		return err
	}
	const lvt0, lvt1, modeExtINT, modeNMI = 0x350, 0x360, 7 << 8, 4 << 8
	setLAPIC(&lapic, lvt0, modeExtINT)
	setLAPIC(&lapic, lvt1, modeNMI)
	return c.SetLAPIC(lapic)
}

// setLAPIC stores a 32-bit register at its offset.
func setLAPIC(l *kvm.LAPIC, offset int, value uint32) {
	for i := range 4 {
		l.Regs[offset+i] = byte(value >> (8 * i))
	}
}
