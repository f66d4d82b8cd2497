package vmm

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

// RestoreOptions are the options of a VM that is not booted but restored.
type RestoreOptions struct {
	Options
	// NewGenerationID tells the guest that it is another VM than the one that
	// was saved, as a restore and a clone must.
	NewGenerationID bool
	// NewMACs gives the network devices the addresses of the configuration
	// instead of the saved ones. A driver that runs has read the old ones.
	NewMACs bool
	// AdvanceClock lets the guest's clock jump by the time since the save, as
	// a migration wants it. Otherwise no time has passed for the guest.
	AdvanceClock bool
}

// Restore makes a VM of a saved state, paused: its memory is filled by
// fillMemory, which is called once with memory that the guest has not touched.
// The configuration may have other paths and another name than the saved VM's,
// but describes the same machine. Everything that needs rights is opened here:
// the caller may drop them before [VM.Resume]. ctx bounds the making only.
func Restore(ctx context.Context, cfg config.Config, sections []state.Section, fillMemory func(*memory.Space) error, opts RestoreOptions) (*VM, error) {
	return restore(ctx, cfg, sections, func(m *VM) error { return fillMemory(m.mem) }, opts)
}

// restore is Restore, with a VM whose memory is there and to be filled.
func restore(ctx context.Context, cfg config.Config, sections []state.Section, fill func(*VM) error, opts RestoreOptions) (*VM, error) {
	saved, err := decodeState(sections, &cfg)
	if err != nil {
		return nil, fmt.Errorf("restore: %w", err)
	}
	saved.opts, saved.fill = opts, fill
	if !opts.NewMACs {
		if err := saved.keepMACs(&cfg); err != nil {
			return nil, fmt.Errorf("restore: %w", err)
		}
	}
	m := prepare(cfg, opts.Options)
	m.saved = saved
	err = m.build(ctx, opts.Options)
	if err == nil {
		err = m.applyState(saved)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("restore: %w", err), m.cleanup.close())
	}
	m.begin()
	return m, nil
}

// savedState is a decoded state, on its way into a new VM.
type savedState struct {
	opts RestoreOptions
	fill func(*VM) error
	// disksLater: they are another's yet, and are added at the end.
	disksLater bool
	// began is when a migration did, zero for none: more time cannot have passed.
	began time.Time

	cpu      *cpuSection
	chips    *chipState
	clock    clockState
	platform state.Platform
	pci      state.PCI
	devices  map[string]*state.Virtio
}

// decodeState reads and checks sections against the machine that cfg makes.
// Nothing is constructed before all of them are read.
func decodeState(sections []state.Section, cfg *config.Config) (*savedState, error) {
	set, err := state.NewSet(sections)
	if err != nil {
		return nil, err
	}
	var machine state.Machine
	if err := set.Take("machine", &machine); err != nil {
		return nil, err
	}
	if err := checkMachine(&machine, cfg); err != nil {
		return nil, err
	}
	s := &savedState{devices: map[string]*state.Virtio{}}
	if err := s.takeKVM(set); err != nil {
		return nil, err
	}
	if len(s.cpu.vcpus) != cfg.CPUs {
		return nil, &state.Error{Section: "cpu", Err: fmt.Errorf("%d vCPUs, want %d", len(s.cpu.vcpus), cfg.CPUs)}
	}
	if err := set.Take("platform", &s.platform); err != nil {
		return nil, err
	}
	if err := set.Take("pci", &s.pci); err != nil {
		return nil, err
	}
	for _, name := range deviceNames(cfg) {
		x := &state.Virtio{}
		if err := set.Take(name, x); err != nil {
			return nil, err
		}
		s.devices[name] = x
	}
	return s, set.Empty()
}

// takeKVM reads the sections of what KVM keeps.
func (s *savedState) takeKVM(set state.Set) error {
	var cpu state.CPU
	var chips state.IRQChip
	var clock state.Clock
	err := set.Take("cpu", &cpu)
	if err == nil {
		if s.cpu, err = decodeCPU(&cpu); err != nil {
			err = &state.Error{Section: "cpu", Err: err}
		}
	}
	if err != nil {
		return err
	}
	if err = set.Take("irqchip", &chips); err == nil {
		if s.chips, err = decodeChips(&chips); err != nil {
			err = &state.Error{Section: "irqchip", Err: err}
		}
	}
	if err != nil {
		return err
	}
	if err = set.Take("clock", &clock); err == nil {
		if s.clock, err = decodeClock(&clock); err != nil {
			err = &state.Error{Section: "clock", Err: err}
		}
	}
	return err
}

// deviceNames are the virtio devices of a machine in the order of their slots.
func deviceNames(cfg *config.Config) []string {
	var names []string
	for i := range cfg.Disks {
		names = append(names, fmt.Sprintf("blk%d", i))
	}
	for i := range presentNets(cfg) {
		names = append(names, fmt.Sprintf("net%d", i))
	}
	if cfg.RNG {
		names = append(names, "rng0")
	}
	if cfg.Balloon.Enabled {
		names = append(names, "balloon0")
	}
	if cfg.Console == config.ConsoleVirtio {
		names = append(names, "console0")
	}
	return names
}

// keepMACs gives the networks of cfg the saved addresses, so that what is behind
// them knows the guest.
func (s *savedState) keepMACs(cfg *config.Config) error {
	cfg.Nets = slices.Clone(cfg.Nets)
	for i, n := range presentNets(cfg) {
		name := fmt.Sprintf("net%d", i)
		own, err := s.devices[name].GetNet().State()
		if err != nil {
			return &state.Error{Section: name, Err: err}
		}
		n.MAC = net.HardwareAddr(own.MAC[:]).String()
	}
	return nil
}

// prepareCPUs checks that this host can be what the guest runs on, and returns
// the guest's CPUID. host is what this host would give it.
func (s *savedState) prepareCPUs(host []kvm.CPUIDEntry, msrs []uint32) ([]kvm.CPUIDEntry, error) {
	if err := checkFeatures(s.cpu.cpuid, host); err != nil {
		return nil, err
	}
	for i, c := range s.cpu.vcpus {
		if err := c.checkMSRs(msrs); err != nil {
			return nil, fmt.Errorf("vCPU %d: %w", i, err)
		}
	}
	return s.cpu.cpuid, nil
}

// setTSCKHz lets the guest's time-stamp counter run as it did.
func (s *savedState) setTSCKHz(c *kvm.VCPU) error {
	here, err := c.TSCKHz()
	if err != nil || s.cpu.tscKHz == 0 || here == s.cpu.tscKHz {
		return nil //nolint:nilerr // where the frequency is unknown, it is taken as it is
	}
	if err := c.SetTSCKHz(s.cpu.tscKHz); err != nil {
		return fmt.Errorf("the guest's time-stamp counter runs at %d kHz, this host's at %d kHz: %w", s.cpu.tscKHz, here, err)
	}
	return nil
}

// passed is how much time has passed for the guest since it was saved, and what
// that is in ticks of its time-stamp counter.
func (s *savedState) passed() (later time.Duration, ahead uint64) {
	if !s.opts.AdvanceClock {
		return 0, 0
	}
	later = s.clock.since()
	if !s.began.IsZero() {
		later = min(later, time.Since(s.began)) // the hosts' clocks may differ
	}
	return later, ticks(later, s.cpu.tscKHz)
}

// applyState gives the parts of a new VM their states. The local APICs come
// before what sends them interrupts, and the pins before the devices that drive
// them. Preconditions: no vCPU has run.
func (m *VM) applyState(s *savedState) error {
	for i, c := range m.vcpus {
		if err := s.cpu.vcpus[i].apply(c.kvm); err != nil {
			return fmt.Errorf("vCPU %d: %w", i, err)
		}
	}
	if err := s.chips.apply(m.kvm); err != nil {
		return err
	}
	if err := m.setTime(s, func(_ *vcpu, fn func() error) error { return fn() }); err != nil {
		return err
	}
	if err := m.platform.restore(&s.platform); err != nil {
		return &state.Error{Section: "platform", Err: err}
	}
	bus, err := s.pci.State()
	if err == nil {
		err = m.pci.bus.SetState(bus)
	}
	if err != nil {
		return &state.Error{Section: "pci", Err: err}
	}
	for _, d := range m.pci.devices {
		if err := d.restore(s.devices[d.info.Name], s.opts.NewMACs); err != nil {
			return &state.Error{Section: d.info.Name, Err: err}
		}
	}
	if s.opts.NewGenerationID {
		return m.platform.ged.ChangeGenerationID()
	}
	return nil
}

// beginTime lets the clocks of a restored guest begin where they stood: some time
// may have passed since they were set. Once the guest has run it does nothing.
// Preconditions: mu is held.
func (m *VM) beginTime(ctx context.Context) error {
	s := m.saved
	if s == nil {
		return nil
	}
	return m.setTime(s, func(c *vcpu, fn func() error) error { return c.do(ctx, fn) })
}
