package vmm

import (
	"fmt"

	"ditto.vm/vmm/kvm"
)

// resetState is the machine as KVM made it, before the guest touched it. A
// restart applies it instead of making a new VM, so that file descriptors,
// interrupts and doorbells stay.
type resetState struct {
	cpus  []*cpuState
	chips *chipState
}

// captureReset reads the power-on state. Preconditions: no vCPU has run.
func (m *VM) captureReset() error {
	for _, c := range m.vcpus {
		s, err := captureCPU(c.kvm, m.msrIndices)
		if err != nil {
			return fmt.Errorf("read the power-on state of vCPU %d: %w", c.id, err)
		}
		s.msrs = withoutTime(s.msrs)
		m.reset0.cpus = append(m.reset0.cpus, s)
	}
	var err error
	m.reset0.chips, err = captureChips(m.kvm)
	return err
}

// applyVM resets what belongs to no vCPU.
func (r *resetState) applyVM(vm *kvm.VM) error { return r.chips.apply(vm) }
