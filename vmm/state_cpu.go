package vmm

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"slices"

	"ditto.vm/migration/state"
	"ditto.vm/vmm/kvm"
)

// What a section "cpu" may hold at most.
const (
	maxCPUIDLeaves = 256 // KVM_MAX_CPUID_ENTRIES
	maxMSRs        = 4096
	xsaveSize      = 4096 // struct kvm_xsave
	maxTSCKHz      = 10_000_000
)

// cpuSection is what a section "cpu" says.
type cpuSection struct {
	cpuid  []kvm.CPUIDEntry
	tscKHz uint64
	vcpus  []*cpuState
}

// message writes the section down.
func (s *cpuSection) message() (*state.CPU, error) {
	x := &state.CPU{TscKhz: s.tscKHz}
	for _, e := range s.cpuid {
		x.Cpuid = append(x.Cpuid, &state.CPUIDLeaf{
			Function: e.Function, Index: e.Index, Flags: e.Flags,
			Eax: e.EAX, Ebx: e.EBX, Ecx: e.ECX, Edx: e.EDX,
		})
	}
	for i, c := range s.vcpus {
		v, err := c.message()
		if err != nil {
			return nil, fmt.Errorf("vCPU %d: %w", i, err)
		}
		x.Vcpus = append(x.Vcpus, v)
	}
	return x, nil
}

// message writes one vCPU down.
func (s *cpuState) message() (*state.VCPU, error) {
	var p packer
	v := &state.VCPU{
		Regs: p.pack(s.regs), Sregs: p.pack(s.sregs), Xcrs: p.pack(s.xcrs),
		Xsave: trimZeros(s.xsave), Lapic: p.pack(s.lapic),
		DebugRegs: p.pack(s.debug), Events: p.pack(s.events),
		MpState:    s.mpState,
		MsrIndices: make([]uint32, len(s.msrs)), MsrValues: make([]uint64, len(s.msrs)),
	}
	for i, m := range s.msrs {
		v.MsrIndices[i], v.MsrValues[i] = m.Index, m.Value
	}
	return v, p.err
}

// decodeCPUID reads what a section "cpu" says of all vCPUs together.
func decodeCPUID(x *state.CPU) (*cpuSection, error) {
	if n := len(x.GetCpuid()); n == 0 || n > maxCPUIDLeaves {
		return nil, fmt.Errorf("%d CPUID leaves, not 1 to %d", n, maxCPUIDLeaves)
	}
	if x.GetTscKhz() > maxTSCKHz {
		return nil, fmt.Errorf("a time-stamp counter of %d kHz", x.GetTscKhz())
	}
	s := &cpuSection{tscKHz: x.GetTscKhz()}
	for _, l := range x.GetCpuid() {
		s.cpuid = append(s.cpuid, kvm.CPUIDEntry{
			Function: l.GetFunction(), Index: l.GetIndex(), Flags: l.GetFlags(),
			EAX: l.GetEax(), EBX: l.GetEbx(), ECX: l.GetEcx(), EDX: l.GetEdx(),
		})
	}
	return s, nil
}

// decodeCPU reads a section "cpu".
func decodeCPU(x *state.CPU) (*cpuSection, error) {
	if n := len(x.GetVcpus()); n == 0 || n > state.MaxVCPUs {
		return nil, fmt.Errorf("%d vCPUs, not 1 to %d", n, state.MaxVCPUs)
	}
	s, err := decodeCPUID(x)
	if err != nil {
		return nil, err
	}
	for i, v := range x.GetVcpus() {
		c, err := decodeVCPU(v)
		if err != nil {
			return nil, fmt.Errorf("vCPU %d: %w", i, err)
		}
		s.vcpus = append(s.vcpus, c)
	}
	return s, nil
}

// decodeVCPU reads one vCPU. What the registers hold is the guest's affair, and
// KVM's to check.
func decodeVCPU(v *state.VCPU) (*cpuState, error) {
	var s cpuState
	var p packer
	p.unpack("registers", v.GetRegs(), &s.regs)
	p.unpack("special registers", v.GetSregs(), &s.sregs)
	p.unpack("extended control registers", v.GetXcrs(), &s.xcrs)
	p.unpack("local APIC", v.GetLapic(), &s.lapic)
	p.unpack("debug registers", v.GetDebugRegs(), &s.debug)
	p.unpack("events", v.GetEvents(), &s.events)
	if p.err != nil {
		return nil, p.err
	}
	s.mpState = v.GetMpState()
	indices, values := v.GetMsrIndices(), v.GetMsrValues()
	switch {
	case len(v.GetXsave()) > xsaveSize:
		return nil, fmt.Errorf("%d bytes of XSAVE, more than %d", len(v.GetXsave()), xsaveSize)
	case s.mpState > kvm.MPStateSIPIReceived:
		return nil, fmt.Errorf("multiprocessing state %d", s.mpState)
	case len(indices) != len(values) || len(indices) > maxMSRs:
		return nil, fmt.Errorf("%d MSRs and %d values", len(indices), len(values))
	case s.xcrs.NrXRCS > uint32(len(s.xcrs.Registers)):
		return nil, fmt.Errorf("%d extended control registers", s.xcrs.NrXRCS)
	}
	s.xsave = make([]byte, xsaveSize)
	copy(s.xsave, v.GetXsave())
	for i, index := range indices {
		s.msrs = append(s.msrs, kvm.MSR{Index: index, Value: values[i]})
	}
	return &s, nil
}

// checkMSRs refuses registers that are no part of a vCPU's state here.
func (s *cpuState) checkMSRs(known []uint32) error {
	for _, m := range s.msrs {
		if m.Value != 0 && !slices.Contains(known, m.Index) {
			return fmt.Errorf("MSR %#x = %#x is not known to this host's KVM", m.Index, m.Value)
		}
	}
	return nil
}

// after returns the state with the time-stamp counter some ticks on.
func (s *cpuState) after(ticks uint64) *cpuState {
	later := *s
	later.msrs = slices.Clone(s.msrs)
	later.setTSC(s.tsc() + ticks)
	return &later
}

// tsc is the time-stamp counter.
func (s *cpuState) tsc() uint64 {
	for _, m := range s.msrs {
		if m.Index == msrTSC {
			return m.Value
		}
	}
	return 0
}

// setTSC changes what the time-stamp counter was.
func (s *cpuState) setTSC(v uint64) {
	for i := range s.msrs {
		if s.msrs[i].Index == msrTSC {
			s.msrs[i].Value = v
		}
	}
}

// timeMSRs returns some registers in the order in which they are set.
func (s *cpuState) timeMSRs(indices ...uint32) []kvm.MSR {
	var msrs []kvm.MSR
	for _, m := range s.msrs {
		if slices.Contains(indices, m.Index) {
			msrs = append(msrs, m)
		}
	}
	return orderMSRs(msrs)
}

// packer converts the structures of the KVM API to bytes and back, and remembers
// the first failure.
type packer struct{ err error }

func (p *packer) pack(v any) []byte {
	b, err := binary.Append(nil, binary.LittleEndian, v)
	if err != nil && p.err == nil {
		p.err = err
	}
	return b
}

// unpack fills v, a pointer, from bytes of exactly its size.
func (p *packer) unpack(what string, b []byte, v any) {
	if want := binary.Size(v); len(b) != want {
		if p.err == nil {
			p.err = fmt.Errorf("%d bytes of %s, want %d", len(b), what, want)
		}
		return
	}
	if _, err := binary.Decode(b, binary.LittleEndian, v); err != nil && p.err == nil {
		p.err = fmt.Errorf("%s: %w", what, err)
	}
}

// trimZeros leaves out the zeros at the end.
func trimZeros(b []byte) []byte { return bytes.TrimRight(b, "\x00") }
