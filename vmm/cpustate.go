package vmm

import (
	"fmt"

	"ditto.vm/vmm/kvm"
)

// cpuState is everything KVM keeps of one vCPU. A restore applies it in the
// order of [cpuState.apply], which is not the order in which it is read.
type cpuState struct {
	regs    kvm.Regs
	sregs   kvm.Sregs
	xcrs    kvm.XCRS
	xsave   []byte
	lapic   kvm.LAPIC
	msrs    []kvm.MSR
	debug   kvm.DebugRegs
	events  kvm.Events
	mpState uint32
}

// MSRs with an order of their own, or that a reset must leave alone.
const (
	msrTSC         = 0x10
	msrTSCAdjust   = 0x3b
	msrMiscEnable  = 0x1a0
	msrMTRRDefType = 0x2ff
	msrTSCDeadline = 0x6e0
)

// captureCPU reads a vCPU's state. Preconditions: the calling thread runs the
// vCPU, or the vCPU has never run.
func captureCPU(c *kvm.VCPU, msrIndices []uint32) (*cpuState, error) {
	var s cpuState
	var err error
	// MP_STATE first: reading it makes KVM process a pending INIT or SIPI.
	if s.mpState, err = c.MPState(); err != nil {
		return nil, err
	}
	if s.regs, err = c.Regs(); err != nil {
		return nil, err
	}
	if s.sregs, err = c.Sregs(); err != nil {
		return nil, err
	}
	if s.xcrs, err = c.XCRS(); err != nil {
		return nil, err
	}
	if s.xsave, err = c.XSAVE(); err != nil {
		return nil, err
	}
	if s.lapic, err = c.LAPIC(); err != nil {
		return nil, err
	}
	if s.msrs, err = c.MSRs(msrIndices); err != nil {
		return nil, err
	}
	if s.debug, err = c.DebugRegs(); err != nil {
		return nil, err
	}
	if s.events, err = c.Events(); err != nil {
		return nil, err
	}
	return &s, nil
}

// apply writes the state to a vCPU whose CPUID is set. Segments come first for
// the APIC base; the LAPIC's mode must stand before its deadline timer is
// armed, so IA32_TSC_DEADLINE goes last of all MSRs.
func (s *cpuState) apply(c *kvm.VCPU) error {
	if err := c.SetSregs(s.sregs); err != nil {
		return err
	}
	if err := c.SetRegs(s.regs); err != nil {
		return err
	}
	if err := c.SetXCRS(s.xcrs); err != nil {
		return err
	}
	if err := c.SetXSAVE(s.xsave); err != nil {
		return err
	}
	if err := c.SetLAPIC(s.lapic); err != nil {
		return err
	}
	if err := setMSRs(c, orderMSRs(s.msrs)); err != nil {
		return err
	}
	if err := c.SetDebugRegs(s.debug); err != nil {
		return err
	}
	if err := c.SetEvents(s.events); err != nil {
		return err
	}
	return c.SetMPState(s.mpState)
}

// orderMSRs returns the registers with IA32_TSC first and IA32_TSC_DEADLINE
// last.
func orderMSRs(msrs []kvm.MSR) []kvm.MSR {
	ordered := make([]kvm.MSR, 0, len(msrs))
	var last []kvm.MSR
	for _, m := range msrs {
		switch m.Index {
		case msrTSC:
			ordered = append([]kvm.MSR{m}, ordered...)
		case msrTSCDeadline:
			last = append(last, m)
		default:
			ordered = append(ordered, m)
		}
	}
	return append(ordered, last...)
}

// withoutTime drops the time-stamp counter, which goes on across a reset.
func withoutTime(msrs []kvm.MSR) []kvm.MSR {
	kept := make([]kvm.MSR, 0, len(msrs))
	for _, m := range msrs {
		if m.Index != msrTSC && m.Index != msrTSCAdjust {
			kept = append(kept, m)
		}
	}
	return kept
}

// setMSRs writes registers, and skips those that read as zero and cannot be
// written: KVM lists a few read-only ones.
func setMSRs(c *kvm.VCPU, msrs []kvm.MSR) error {
	for len(msrs) > 0 {
		n, err := c.SetMSRs(msrs)
		if err != nil {
			return err
		}
		if n < len(msrs) {
			if refused := msrs[n]; refused.Value != 0 {
				return fmt.Errorf("KVM refused MSR %#x = %#x", refused.Index, refused.Value)
			}
			n++
		}
		msrs = msrs[n:]
	}
	return nil
}
