package vmm

import (
	"math/bits"

	"ditto.vm/vmm/kvm"
)

// CPUID leaves that ditto edits (Intel SDM 2A CPUID, AMD APM 3 appendix E).
const (
	leafFeatures       = 0x1
	leafCacheIntel     = 0x4
	leafPerfMonitoring = 0xa
	leafTopology       = 0xb
	leafTopologyV2     = 0x1f
	leafHypervisor     = 0x40000000
	leafKVMFeatures    = 0x40000001
	leafExtFeatures    = 0x80000001
	leafExtPower       = 0x80000007
	leafExtSizes       = 0x80000008
	leafSVM            = 0x8000000a
	leafCacheAMD       = 0x8000001d
	leafTopologyAMD    = 0x8000001e
)

// Feature bits.
const (
	ecx1VMX          = 1 << 5
	ecx1X2APIC       = 1 << 21
	ecx1TSCDeadline  = 1 << 24
	ecx1Hypervisor   = 1 << 31
	edx1HTT          = 1 << 28
	ecxExtCmpLegacy  = 1 << 1
	ecxExtSVM        = 1 << 2
	ecxExtTopology   = 1 << 22
	topologyTypeSMT  = 1 << 8
	topologyTypeCore = 2 << 8
)

// guestCPUID derives what every vCPU of a VM sees from what KVM supports: one
// package with n cores of one thread. Nested virtualization is withheld, since
// its state is not part of a VM's state. The result is a part of the VM's state
// and is what a restore applies; [vcpuCPUID] makes it one vCPU's.
func guestCPUID(supported []kvm.CPUIDEntry, n int, tscDeadline bool) []kvm.CPUIDEntry {
	out := make([]kvm.CPUIDEntry, 0, len(supported)+2)
	for _, e := range supported {
		switch e.Function {
		case leafFeatures:
			e.ECX &^= ecx1VMX | ecx1TSCDeadline
			e.ECX |= ecx1Hypervisor | ecx1X2APIC
			if tscDeadline {
				e.ECX |= ecx1TSCDeadline
			}
			e.EDX &^= edx1HTT
			if n > 1 {
				e.EDX |= edx1HTT
			}
			e.EBX = e.EBX&0x0000ffff | uint32(n)<<16
		case leafCacheIntel:
			if e.EAX&0x1f != 0 {
				e.EAX = e.EAX&0x3fff | coreMask(n)<<26 | sharing(e, n)<<14
			}
		case leafPerfMonitoring:
			e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
		case leafTopology, leafTopologyV2, leafSVM:
			continue // topology is rebuilt below
		case leafExtFeatures:
			e.ECX &^= ecxExtSVM | ecxExtCmpLegacy
			if n > 1 && e.ECX&ecxExtTopology == 0 {
				e.ECX |= ecxExtCmpLegacy
			}
		case leafExtSizes:
			e.ECX = e.ECX&^0xf0ff | uint32(n-1)&0xff | uint32(idBits(n))<<12
		case leafCacheAMD:
			if e.EAX&0x1f != 0 {
				e.EAX = e.EAX&0x3fff | sharing(e, n)<<14
			}
		case leafTopologyAMD:
			// One node; the core's identity is filled in per vCPU.
			e.EAX, e.EBX, e.ECX, e.EDX = 0, 0, 0, 0
		}
		out = append(out, e)
	}
	for _, leaf := range []uint32{leafTopology, leafTopologyV2} {
		if leaf == leafTopologyV2 && !hasLeaf(supported, leafTopologyV2) {
			continue
		}
		out = append(out,
			kvm.CPUIDEntry{Function: leaf, Index: 0, Flags: kvm.CPUIDSignificantIndex, EBX: 1, ECX: topologyTypeSMT},
			kvm.CPUIDEntry{Function: leaf, Index: 1, Flags: kvm.CPUIDSignificantIndex, EAX: uint32(idBits(n)), EBX: uint32(n), ECX: topologyTypeCore | 1},
		)
	}
	return out
}

// vcpuCPUID fills in the leaves that differ between the vCPUs of a VM.
func vcpuCPUID(guest []kvm.CPUIDEntry, id int) []kvm.CPUIDEntry {
	out := append([]kvm.CPUIDEntry(nil), guest...)
	for i := range out {
		switch e := &out[i]; e.Function {
		case leafFeatures:
			e.EBX = e.EBX&0x00ffffff | uint32(id)<<24
		case leafTopology, leafTopologyV2:
			e.EDX = uint32(id)
		case leafTopologyAMD:
			e.EAX, e.EBX = uint32(id), uint32(id)&0xff
		}
	}
	return out
}

// idBits is the width of an APIC ID field that numbers n cores.
func idBits(n int) int { return bits.Len(uint(n - 1)) }

// coreMask is the "addressable core IDs" field: a power of two minus one.
func coreMask(n int) uint32 { return uint32(1<<idBits(n)-1) & 0x3f }

// sharing is the "threads sharing this cache" field: a level 3 cache serves all
// cores, the others one.
func sharing(e kvm.CPUIDEntry, n int) uint32 {
	if level := e.EAX >> 5 & 7; level >= 3 {
		return uint32(1<<idBits(n) - 1)
	}
	return 0
}

func hasLeaf(entries []kvm.CPUIDEntry, leaf uint32) bool {
	for _, e := range entries {
		if e.Function == leaf {
			return true
		}
	}
	return false
}
