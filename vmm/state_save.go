package vmm

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/proto"

	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
)

// SaveState returns the state of a paused VM: everything but the pages of its
// memory. The VM stays as it is and may be resumed.
func (m *VM) SaveState(ctx context.Context) ([]state.Section, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.state != api.Paused:
		return nil, fmt.Errorf("save: VM is %s, not paused: %w", m.state, api.ErrWrongState)
	case m.resetDue.Load() || len(m.requests) > 0:
		// What the guest has asked for is not a part of any section.
		return nil, fmt.Errorf("save: the guest is about to restart or end: %w", api.ErrWrongState)
	}
	sections, err := m.saveState(ctx)
	if err != nil {
		return nil, fmt.Errorf("save: %w", err)
	}
	return sections, nil
}

// saveState is SaveState. Preconditions: mu is held and the VM is paused.
func (m *VM) saveState(ctx context.Context) ([]state.Section, error) {
	var e sectionEncoder
	e.add("machine", machineMessage(&m.cfg, m.ramRanges(), m.version), nil)
	if err := m.beginTime(ctx); err != nil {
		return nil, err // a guest that has not run yet: no time has passed for it
	}
	cpus, err := m.captureCPUs(ctx)
	if err != nil {
		return nil, err
	}
	clock, pmTimer, err := m.captureTime(ctx, cpus)
	if err != nil {
		return nil, err
	}
	cpu, err := cpus.message()
	e.add("cpu", cpu, err)
	chips, err := captureChips(m.kvm)
	if err != nil {
		return nil, err
	}
	irqchip, err := chips.message()
	e.add("irqchip", irqchip, err)
	e.add("clock", clock.message(), nil)
	e.add("platform", m.platform.message(pmTimer), nil)
	e.add("pci", state.NewPCI(m.pci.bus.State()), nil)
	for _, d := range m.pci.devices {
		x, err := d.message()
		e.add(d.info.Name, x, err)
	}
	return e.sections, e.err
}

// sectionEncoder collects sections and the first failure.
type sectionEncoder struct {
	sections []state.Section
	err      error
}

func (e *sectionEncoder) add(name string, m proto.Message, err error) {
	if e.err != nil {
		return
	}
	if err != nil {
		e.err = fmt.Errorf("%s: %w", name, err)
		return
	}
	s, err := state.Encode(name, m)
	e.sections, e.err = append(e.sections, s), err
}

// captureCPUs reads the state of every vCPU on its thread.
func (m *VM) captureCPUs(ctx context.Context) (*cpuSection, error) {
	s := &cpuSection{cpuid: m.cpuid, vcpus: make([]*cpuState, len(m.vcpus))}
	for i, c := range m.vcpus {
		err := c.do(ctx, func() (err error) {
			s.vcpus[i], err = captureCPU(c.kvm, m.msrIndices)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("vCPU %d: %w", i, err)
		}
	}
	// Not every KVM knows the frequency; a restore then takes it as it is.
	if khz, err := m.vcpus[0].kvm.TSCKHz(); err == nil {
		s.tscKHz = khz
	}
	return s, nil
}

// ramRanges are where the guest has RAM.
func (m *VM) ramRanges() []memory.Range {
	var ranges []memory.Range
	for _, r := range m.mem.Regions() {
		ranges = append(ranges, r.Range)
	}
	return ranges
}
