package kvm

import (
	"os"
	"testing"
	"unsafe"
)

// open skips without /dev/kvm, or fails when DITTO_REQUIRE_KVM says it must be
// there.
func open(t *testing.T) *System {
	t.Helper()
	s, err := Open()
	if err != nil {
		if os.Getenv("DITTO_REQUIRE_KVM") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v; try: run as a member of the kvm group on a machine with KVM", err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestStructSizes compares the mirrors with the sizes of include/uapi/linux/kvm.h.
func TestStructSizes(t *testing.T) {
	for _, tt := range []struct {
		name      string
		got, want uintptr
	}{
		{"kvm_cpuid_entry2", unsafe.Sizeof(CPUIDEntry{}), 40},
		{"kvm_msr_entry", unsafe.Sizeof(MSR{}), 16},
		{"kvm_enable_cap", unsafe.Sizeof(enableCap{}), 104},
		{"kvm_irqfd", unsafe.Sizeof(irqfd{}), 32},
		{"kvm_ioeventfd", unsafe.Sizeof(ioeventfd{}), 64},
		{"kvm_irq_routing_entry", unsafe.Sizeof(routingEntry{}), 48},
		{"kvm_pit_config", unsafe.Sizeof(pitConfig{}), 64},
		{"kvm_vcpu_events", unsafe.Sizeof(Events{}), 64},
		{"kvm_sregs", unsafe.Sizeof(Sregs{}), 312},
		{"kvm_run exit union", unsafe.Offsetof(runData{}.data), 32},
	} {
		if tt.got != tt.want {
			t.Errorf("%s: size or offset %d, want %d", tt.name, tt.got, tt.want)
		}
	}
}

func TestSystem(t *testing.T) {
	s := open(t)
	if s.CheckExtension(CapUserMemory) == 0 || s.CheckExtension(CapImmediateExit) == 0 {
		t.Error("KVM_CAP_USER_MEMORY or KVM_CAP_IMMEDIATE_EXIT is missing")
	}
	cpuid, err := s.SupportedCPUID()
	if err != nil || len(cpuid) == 0 {
		t.Fatalf("SupportedCPUID: %d entries, %v", len(cpuid), err)
	}
	msrs, err := s.MSRIndices()
	if err != nil || len(msrs) == 0 {
		t.Fatalf("MSRIndices: %d, %v", len(msrs), err)
	}
}

func TestVM(t *testing.T) {
	s := open(t)
	vm, err := s.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	defer vm.Close()
	if err := vm.SetIdentityMapAddr(0xfffbc000); err != nil {
		t.Error(err)
	}
	if err := vm.SetTSSAddr(0xfffbd000); err != nil {
		t.Error(err)
	}
	if err := vm.CreateIRQChip(); err != nil {
		t.Fatal(err)
	}
	if err := vm.CreatePIT(); err != nil {
		t.Fatal(err)
	}
	if err := vm.SetRoutes([]Route{{GSI: 4, Chip: ChipIOAPIC, Pin: 4}, {GSI: 24, Chip: -1, Address: 0xfee00000, Data: 0x30}}); err != nil {
		t.Error(err)
	}
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	defer vcpu.Close()

	cpuid, err := s.SupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	if err := vcpu.SetCPUID(cpuid); err != nil {
		t.Fatal(err)
	}
	back, err := vcpu.CPUID()
	if err != nil || len(back) != len(cpuid) {
		t.Errorf("CPUID: %d entries of %d came back, %v", len(back), len(cpuid), err)
	}
	indices, err := s.MSRIndices()
	if err != nil {
		t.Fatal(err)
	}
	msrs, err := vcpu.MSRs(indices)
	if err != nil || len(msrs) == 0 {
		t.Errorf("MSRs: %d of %d, %v", len(msrs), len(indices), err)
	}
	roundTrips(t, vcpu, vm)

	stats, err := vm.StatsFD()
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	values, err := stats.Read()
	if err != nil {
		t.Fatal(err)
	}
	if _, ok := values["pages_2m"]; !ok {
		t.Errorf("no pages_2m among %d statistics", len(values))
	}
}

// roundTrips writes back every piece of state that can be read.
func roundTrips(t *testing.T, c *VCPU, v *VM) {
	t.Helper()
	check := func(name string, err error) {
		t.Helper()
		if err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	regs, err := c.Regs()
	check("regs", err)
	check("regs", c.SetRegs(regs))
	sregs, err := c.Sregs()
	check("sregs", err)
	check("sregs", c.SetSregs(sregs))
	xsave, err := c.XSAVE()
	check("xsave", err)
	check("xsave", c.SetXSAVE(xsave))
	xcrs, err := c.XCRS()
	check("xcrs", err)
	check("xcrs", c.SetXCRS(xcrs))
	lapic, err := c.LAPIC()
	check("lapic", err)
	check("lapic", c.SetLAPIC(lapic))
	mp, err := c.MPState()
	check("mp state", err)
	check("mp state", c.SetMPState(mp))
	events, err := c.Events()
	check("events", err)
	check("events", c.SetEvents(events))
	if khz, err := c.TSCKHz(); err == nil {
		check("TSC frequency", c.SetTSCKHz(khz))
	}
	offset, err := c.TSCOffset()
	check("TSC offset", err)
	check("TSC offset", c.SetTSCOffset(offset+12345))
	moved, err := c.TSCOffset()
	check("TSC offset", err)
	// A KVM whose guests read the host's counter ignores the offset.
	if moved != offset+12345 && (moved != offset || os.Getenv("DITTO_LAB") != "") {
		t.Errorf("TSC offset %#x, want %#x", moved, offset+12345)
	}
	debug, err := c.DebugRegs()
	check("debug registers", err)
	check("debug registers", c.SetDebugRegs(debug))
	for _, id := range []uint32{ChipPICMaster, ChipPICSlave, ChipIOAPIC} {
		chip, err := v.IRQChip(id)
		check("irqchip", err)
		check("irqchip", v.SetIRQChip(chip))
	}
	pit, err := v.PIT()
	check("pit", err)
	check("pit", v.SetPIT(pit))
	clock, err := v.Clock()
	check("clock", err)
	clock.Flags = 0
	check("clock", v.SetClock(clock))
}

// TestProbeLinux: inside the lab, and wherever hardware virtualization is
// present, the answer must be yes; elsewhere it must come with a reason.
func TestProbeLinux(t *testing.T) {
	s := open(t)
	got, err := s.ProbeLinux()
	if err != nil {
		t.Fatal(err)
	}
	if got.OK == (got.Reason != "") {
		t.Errorf("ProbeLinux() = %+v: a reason must come with a no, and only then", got)
	}
	if os.Getenv("DITTO_LAB") != "" && !got.OK {
		t.Errorf("ProbeLinux() in the lab: %s", got.Reason)
	}
	t.Logf("%+v", got)
}
