package vmm

import (
	"testing"

	"ditto.vm/vmm/kvm"
)

// epyc is the shape of what KVM reports on an AMD host, with marks in the
// fields that must be replaced.
func epyc() []kvm.CPUIDEntry {
	return []kvm.CPUIDEntry{
		{Function: 0x0, EAX: 0xd, EBX: 0x68747541, ECX: 0x444d4163, EDX: 0x69746e65},
		{Function: 0x1, EAX: 0x800f12, EBX: 0x07400800, ECX: 1<<5 | 1<<0, EDX: 0x178bfbff},
		{Function: 0x4, Index: 0, Flags: 1, EAX: 0x1c004121},
		{Function: 0x4, Index: 3, Flags: 1, EAX: 0x1c03c163},
		{Function: 0xa, EAX: 0x7300404},
		{Function: 0xb, Index: 0, Flags: 1, EAX: 1, EBX: 2, ECX: 0x100, EDX: 7},
		{Function: 0x40000000, EAX: 0x40000001, EBX: 0x4b4d564b},
		{Function: 0x80000001, ECX: 1<<2 | 1<<22},
		{Function: 0x80000008, ECX: 0x7007},
		{Function: 0x8000000a, EDX: 0xff},
		{Function: 0x8000001d, Index: 3, Flags: 1, EAX: 0x1c163},
		{Function: 0x8000001e, EAX: 7, EBX: 0x103, ECX: 0x201},
	}
}

func leaf(t *testing.T, entries []kvm.CPUIDEntry, function, index uint32) kvm.CPUIDEntry {
	t.Helper()
	for _, e := range entries {
		if e.Function == function && e.Index == index {
			return e
		}
	}
	t.Fatalf("no leaf %#x.%d", function, index)
	return kvm.CPUIDEntry{}
}

func TestGuestCPUIDTopology(t *testing.T) {
	for _, tt := range []struct {
		cpus, idBits int
	}{{1, 0}, {2, 1}, {3, 2}, {4, 2}, {64, 6}} {
		guest := guestCPUID(epyc(), tt.cpus, true)
		id := tt.cpus - 1
		vcpu := vcpuCPUID(guest, id)

		features := leaf(t, vcpu, leafFeatures, 0)
		if got := features.EBX >> 24; got != uint32(id) {
			t.Errorf("%d CPUs: initial APIC ID %d, want %d", tt.cpus, got, id)
		}
		if got := features.EBX >> 16 & 0xff; got != uint32(tt.cpus) {
			t.Errorf("%d CPUs: logical processors %d", tt.cpus, got)
		}
		if got := features.EDX&edx1HTT != 0; got != (tt.cpus > 1) {
			t.Errorf("%d CPUs: HTT %v", tt.cpus, got)
		}
		cores := leaf(t, vcpu, leafTopology, 1)
		if cores.EAX != uint32(tt.idBits) || cores.EBX != uint32(tt.cpus) || cores.EDX != uint32(id) {
			t.Errorf("%d CPUs: topology %+v, want %d ID bits", tt.cpus, cores, tt.idBits)
		}
		if smt := leaf(t, vcpu, leafTopology, 0); smt.EBX != 1 || smt.EAX != 0 {
			t.Errorf("%d CPUs: threads a core %+v, want 1", tt.cpus, smt)
		}
		sizes := leaf(t, vcpu, leafExtSizes, 0)
		if got := sizes.ECX & 0xff; got != uint32(tt.cpus-1) {
			t.Errorf("%d CPUs: AMD NC %d", tt.cpus, got)
		}
		if got := sizes.ECX >> 12 & 0xf; got != uint32(tt.idBits) {
			t.Errorf("%d CPUs: AMD APIC ID size %d, want %d", tt.cpus, got, tt.idBits)
		}
		l3 := leaf(t, vcpu, leafCacheAMD, 3)
		if got := l3.EAX >> 14 & 0xfff; got != 1<<tt.idBits-1 {
			t.Errorf("%d CPUs: L3 shared by %d+1", tt.cpus, got)
		}
		l1 := leaf(t, vcpu, leafCacheIntel, 0)
		if got := l1.EAX >> 14 & 0xfff; got != 0 {
			t.Errorf("%d CPUs: L1 shared by %d+1, want 1", tt.cpus, got)
		}
		if got := leaf(t, vcpu, leafTopologyAMD, 0); got.EAX != uint32(id) || got.ECX != 0 {
			t.Errorf("%d CPUs: AMD extended APIC ID %+v", tt.cpus, got)
		}
	}
}

// TestGuestCPUIDWithholds: nested virtualization and the PMU, whose state is
// not saved, must not be offered.
func TestGuestCPUIDWithholds(t *testing.T) {
	guest := guestCPUID(epyc(), 2, false)
	features := leaf(t, guest, leafFeatures, 0)
	if features.ECX&(ecx1VMX|ecx1TSCDeadline) != 0 {
		t.Errorf("leaf 1 ECX %#x offers VMX or a deadline timer that KVM lacks", features.ECX)
	}
	if features.ECX&(ecx1Hypervisor|ecx1X2APIC) != ecx1Hypervisor|ecx1X2APIC {
		t.Errorf("leaf 1 ECX %#x lacks hypervisor or x2APIC", features.ECX)
	}
	if ext := leaf(t, guest, leafExtFeatures, 0); ext.ECX&ecxExtSVM != 0 {
		t.Errorf("extended features %#x offer SVM", ext.ECX)
	}
	if pmu := leaf(t, guest, leafPerfMonitoring, 0); pmu.EAX != 0 {
		t.Errorf("PMU leaf %+v, want zeros", pmu)
	}
	for _, e := range guest {
		if e.Function == leafSVM {
			t.Errorf("leaf %#x is offered", uint32(leafSVM))
		}
	}
	if with := guestCPUID(epyc(), 2, true); leaf(t, with, leafFeatures, 0).ECX&ecx1TSCDeadline == 0 {
		t.Error("a deadline timer that KVM has is withheld")
	}
}

func TestOrderMSRs(t *testing.T) {
	got := orderMSRs([]kvm.MSR{{Index: msrTSCDeadline}, {Index: 1}, {Index: msrTSC}, {Index: 2}})
	want := []uint32{msrTSC, 1, 2, msrTSCDeadline}
	for i, m := range got {
		if m.Index != want[i] {
			t.Fatalf("order %v, want %#x", got, want)
		}
	}
}
