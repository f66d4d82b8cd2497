package vmm

import (
	"encoding/binary"
	"fmt"
	"strings"

	"ditto.vm/vmm/kvm"
)

// FeatureError is a CPU that lacks what a guest was told it has.
type FeatureError struct {
	// Vendor is the guest's CPU vendor when this host has another, and then
	// Missing is empty.
	Vendor, Host string
	// Missing are the features by the names that Linux has for them.
	Missing []string
}

// Error implements error.
func (e *FeatureError) Error() string {
	if len(e.Missing) == 0 {
		return fmt.Sprintf("the guest runs on a CPU of %q, and this host's is of %q", e.Vendor, e.Host)
	}
	return fmt.Sprintf("this host's CPU lacks what the guest uses: %s", strings.Join(e.Missing, ", "))
}

// register selects a register of a CPUID leaf.
type register int

const (
	regEAX register = iota
	regEBX
	regECX
	regEDX
)

// of reads the register.
func (r register) of(e kvm.CPUIDEntry) uint32 { return [...]uint32{e.EAX, e.EBX, e.ECX, e.EDX}[r] }

// String returns the register's name.
func (r register) String() string { return [...]string{"EAX", "EBX", "ECX", "EDX"}[r] }

// featureWord is a register of features, each bit one of them.
type featureWord struct {
	leaf, index uint32
	register    register
	numbers     uint32 // bits that are parts of numbers
	// names of the bits from 0 up, as in /proc/cpuinfo; a dash has none.
	names string
}

// featureWords are the registers in which a guest finds features (Intel SDM 2A
// CPUID, AMD APM 3 appendix E, Linux cpufeatures.h and kvm_para.h).
func featureWords() []featureWord {
	return []featureWord{
		{leaf: leafFeatures, register: regECX, names: "pni pclmulqdq dtes64 monitor ds_cpl vmx smx est tm2 ssse3 cid sdbg fma cx16 xtpr pdcm - pcid dca sse4_1 sse4_2 x2apic movbe popcnt tsc_deadline_timer aes xsave osxsave avx f16c rdrand hypervisor"},
		{leaf: leafFeatures, register: regEDX, names: "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - dts acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"},
		{leaf: 0x7, register: regEBX, names: "fsgsbase tsc_adjust sgx bmi1 hle avx2 fdp_excptn_only smep bmi2 erms invpcid rtm cqm zero_fcs_fds mpx rdt_a avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb intel_pt avx512pf avx512er avx512cd sha_ni avx512bw avx512vl"},
		{leaf: 0x7, register: regECX, numbers: 0x1f << 17, names: "prefetchwt1 avx512vbmi umip pku ospke waitpkg avx512_vbmi2 shstk gfni vaes vpclmulqdq avx512_vnni avx512_bitalg tme avx512_vpopcntdq - la57 - - - - - rdpid keylocker bus_lock_detect cldemote - movdiri movdir64b enqcmd sgx_lc pks"},
		{leaf: 0x7, register: regEDX, names: "- sgx_keys avx512_4vnniw avx512_4fmaps fsrm uintr - - avx512_vp2intersect srbds_ctrl md_clear rtm_always_abort - tsx_force_abort serialize hybrid_cpu tsxldtrk - pconfig arch_lbr ibt - amx_bf16 avx512_fp16 amx_tile amx_int8 spec_ctrl stibp flush_l1d arch_capabilities core_capabilities ssbd"},
		{leaf: 0x7, index: 1, register: regEAX, names: "sha512 sm3 sm4 rao_int avx_vnni avx512_bf16 lass cmpccxadd arch_perfmon_ext - fzrm fsrs fsrc - - - - fred lkgs wrmsrns - amx_fp16 hreset avx_ifma - - lam"},
		{leaf: 0xd, register: regEAX, names: "xstate_x87 xstate_sse xstate_avx xstate_bndregs xstate_bndcsr xstate_opmask xstate_zmm_hi256 xstate_hi16_zmm xstate_pt xstate_pkru - - - - - - - xstate_tilecfg xstate_tiledata"},
		{leaf: 0xd, index: 1, register: regEAX, names: "xsaveopt xsavec xgetbv1 xsaves xfd"},
		{leaf: leafKVMFeatures, register: regEAX, names: "kvm_clocksource kvm_nop_io_delay kvm_mmu_op kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt - kvm_pv_tlb_flush kvm_async_pf_vmexit kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_async_pf_int kvm_msi_ext_dest_id kvm_hc_map_gpa_range kvm_migration_control - - - - - - kvm_clocksource_stable"},
		{leaf: leafExtFeatures, register: regECX, names: "lahf_lm cmp_legacy svm extapic cr8_legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop skinit wdt - lwp fma4 tce - nodeid_msr - tbm topoext perfctr_core perfctr_nb - bpext ptsc perfctr_llc mwaitx"},
		{leaf: leafExtFeatures, register: regEDX, names: "- - - - - - - - - - - syscall - - - - - - - mp nx - mmxext - - fxsr_opt pdpe1gb rdtscp - lm 3dnowext 3dnow"},
		{leaf: leafExtPower, register: regEDX, names: "- - - - - - - - invariant_tsc"},
		{leaf: leafExtSizes, register: regEBX, names: "clzero irperf xsaveerptr - rdpru - - - - wbnoinvd - - ibpb - ibrs amd_stibp - stibp_always_on - - - - - - amd_ssbd virt_ssbd amd_ssb_no"},
		{leaf: 0x80000021, register: regEAX, names: "no_nested_data_bp - lfence_rdtsc - - - null_sel_clr_base - autoibrs - - - - - - - - - - - prefetchi - - - - - - sbpb ibpb_brtype srso_no"},
	}
}

// missing names the features of guest that host does not have.
func (w featureWord) missing(guest, host []kvm.CPUIDEntry) []string {
	want := w.register.of(cpuidLeaf(guest, w.leaf, w.index))
	lost := want &^ w.register.of(cpuidLeaf(host, w.leaf, w.index)) &^ w.numbers
	if lost == 0 {
		return nil
	}
	var out []string
	names := strings.Fields(w.names)
	for bit := range 32 {
		switch {
		case lost&(1<<bit) == 0:
		case bit < len(names) && names[bit] != "-":
			out = append(out, names[bit])
		default:
			out = append(out, fmt.Sprintf("bit %d of CPUID %#x.%d %s", bit, w.leaf, w.index, w.register))
		}
	}
	return out
}

// checkFeatures refuses to give a guest's CPUID to vCPUs of a host that could
// not have made it. host is what this host would give the guest.
func checkFeatures(guest, host []kvm.CPUIDEntry) error {
	if g, h := cpuVendor(guest), cpuVendor(host); g != h {
		return &FeatureError{Vendor: g, Host: h}
	}
	e := &FeatureError{}
	for _, w := range featureWords() {
		e.Missing = append(e.Missing, w.missing(guest, host)...)
	}
	if len(e.Missing) > 0 {
		return e
	}
	return nil
}

// cpuVendor is the name in leaf 0, as in "GenuineIntel".
func cpuVendor(entries []kvm.CPUIDEntry) string {
	e := cpuidLeaf(entries, 0, 0)
	var b []byte
	for _, word := range []uint32{e.EBX, e.EDX, e.ECX} {
		b = binary.LittleEndian.AppendUint32(b, word)
	}
	return strings.TrimRight(string(b), "\x00")
}

// cpuidLeaf returns a leaf, or zeros.
func cpuidLeaf(entries []kvm.CPUIDEntry, leaf, index uint32) kvm.CPUIDEntry {
	for _, e := range entries {
		if e.Function == leaf && e.Index == index {
			return e
		}
	}
	return kvm.CPUIDEntry{}
}
