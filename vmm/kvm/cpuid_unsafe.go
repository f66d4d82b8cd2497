package kvm

import (
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
)

// CPUIDEntry is one leaf (struct kvm_cpuid_entry2).
type CPUIDEntry struct {
	Function, Index, Flags uint32
	EAX, EBX, ECX, EDX     uint32
	_                      [3]uint32
}

// CPUIDSignificantIndex says that Index selects a subleaf of the leaf.
const CPUIDSignificantIndex = 1

// maxCPUIDEntries is KVM_MAX_CPUID_ENTRIES (arch/x86/include/asm/kvm_host.h).
const maxCPUIDEntries = 256

// SupportedCPUID returns what KVM can virtualize on this host (KVM API 4.46).
func (s *System) SupportedCPUID() ([]CPUIDEntry, error) {
	buf := newVariable[CPUIDEntry](maxCPUIDEntries)
	buf.setCount(maxCPUIDEntries)
	if _, err := ioctlPtr("KVM_GET_SUPPORTED_CPUID", s.fd, headerRequest(gokvm.IIOWR, nrGetSupportedCPUID), buf.pointer()); err != nil {
		return nil, err
	}
	return append([]CPUIDEntry(nil), buf.entries(buf.count())...), nil
}

// SetCPUID gives the vCPU its CPUID, before its first run (KVM API 4.40).
func (c *VCPU) SetCPUID(entries []CPUIDEntry) error {
	buf := newVariable[CPUIDEntry](len(entries))
	buf.setCount(len(entries))
	copy(buf.entries(len(entries)), entries)
	_, err := ioctlPtr("KVM_SET_CPUID2", c.fd, headerRequest(gokvm.IIOW, nrSetCPUID2), buf.pointer())
	return err
}

// CPUID returns what the vCPU was given (KVM API 4.41).
func (c *VCPU) CPUID() ([]CPUIDEntry, error) {
	buf := newVariable[CPUIDEntry](maxCPUIDEntries)
	buf.setCount(maxCPUIDEntries)
	if _, err := ioctlPtr("KVM_GET_CPUID2", c.fd, headerRequest(gokvm.IIOWR, nrGetCPUID2), buf.pointer()); err != nil {
		return nil, err
	}
	return append([]CPUIDEntry(nil), buf.entries(buf.count())...), nil
}

// MSR is a model-specific register and its value (struct kvm_msr_entry).
type MSR struct {
	Index uint32
	_     uint32
	Value uint64
}

// MSRIndices lists the registers that make up a vCPU's state (KVM API 4.3).
func (s *System) MSRIndices() ([]uint32, error) {
	const limit = 4096 // far above the few hundred that any kernel reports
	// struct kvm_msr_list has a header of one word: store the entries one
	// word later than variable does.
	buf := make([]uint32, 1+limit)
	buf[0] = limit
	_, err := ioctlPtr("KVM_GET_MSR_INDEX_LIST", s.fd, gokvm.IIOWR(nrGetMSRIndexList, 4), unsafe.Pointer(&buf[0]))
	if err != nil {
		return nil, err
	}
	return append([]uint32(nil), buf[1:1+buf[0]]...), nil
}

// MSRs reads registers. Those the kernel refuses are left out of the result
// (KVM API 4.18: the call stops at the first failure).
func (c *VCPU) MSRs(indices []uint32) ([]MSR, error) {
	var out []MSR
	for len(indices) > 0 {
		buf := newVariable[MSR](len(indices))
		buf.setCount(len(indices))
		entries := buf.entries(len(indices))
		for i, index := range indices {
			entries[i].Index = index
		}
		n, err := ioctlPtr("KVM_GET_MSRS", c.fd, headerRequest(gokvm.IIOWR, nrGetMSRs), buf.pointer())
		if err != nil {
			return nil, err
		}
		out = append(out, entries[:n]...)
		if n < len(indices) {
			n++ // the one that failed
		}
		indices = indices[n:]
	}
	return out, nil
}

// SetMSRs writes registers in order and returns how many the kernel took: it
// stops at the first that it refuses (KVM API 4.19).
func (c *VCPU) SetMSRs(msrs []MSR) (int, error) {
	if len(msrs) == 0 {
		return 0, nil
	}
	buf := newVariable[MSR](len(msrs))
	buf.setCount(len(msrs))
	copy(buf.entries(len(msrs)), msrs)
	return ioctlPtr("KVM_SET_MSRS", c.fd, headerRequest(gokvm.IIOW, nrSetMSRs), buf.pointer())
}
