package vmm

import (
	"slices"
	"strings"

	"ditto.vm/vmm/kvm"
)

// platformFeatures are those that ditto decides, whatever the model: they
// describe the machine around the CPU, or follow CR4.
var platformFeatures = []string{"hypervisor", "x2apic", "apic", "ht", "cmp_legacy", "topoext", "osxsave", "ospke"}

// bootFeatures are what ditto and 64-bit kernels need to start: x86-64-v1 of the
// x86-64 psABI, and what long mode stands on.
const bootFeatures = "fpu tsc msr pae cx8 cmov mmx fxsr sse sse2 syscall lm"

// baselineFeatures are those of a CPU of the baseline besides: what the psABI
// adds for x86-64-v2, what CPUs of its time have for kernels, and the parts of
// KVM's interface that every KVM of Linux 5.10 and later has.
const baselineFeatures = "cx16 lahf_lm popcnt pni sse4_1 sse4_2 ssse3 " +
	"vme de pse mce sep mtrr pge mca pat pse36 clflush nx tsc_deadline_timer tsc_adjust invariant_tsc " +
	"kvm_clocksource kvm_nop_io_delay kvm_clocksource2 kvm_async_pf kvm_steal_time kvm_pv_eoi kvm_pv_unhalt " +
	"kvm_pv_tlb_flush kvm_pv_send_ipi kvm_poll_control kvm_pv_sched_yield kvm_clocksource_stable"

// featureNeeds says which features make no sense without another (Intel SDM 1
// 13 to 15 and 18, AMD APM 3 appendix D). What is needed comes before what needs it.
var featureNeeds = []struct{ needs, features string }{
	{"sse", "sse2"},
	{"sse2", "pni aes pclmulqdq sha_ni gfni sse4a"},
	{"pni", "ssse3"},
	{"ssse3", "sse4_1"},
	{"sse4_1", "sse4_2"},
	{"xsave", "avx pku mpx xsaveopt xsavec xgetbv1 xsaves xfd amx_tile"},
	{"xsavec", "xsaves"},
	{"xsaves", "shstk ibt arch_lbr uintr"},
	{"avx", "avx2 fma f16c vaes vpclmulqdq avx_vnni avx_ifma sha512 sm3 sm4 xop fma4"},
	{"aes", "vaes"},
	{"pclmulqdq", "vpclmulqdq"},
	{"avx2", "avx512f"},
	{"avx512f", "avx512dq avx512ifma avx512pf avx512er avx512cd avx512bw avx512vl avx512vbmi avx512_vbmi2 avx512_vnni " +
		"avx512_bitalg avx512_vpopcntdq avx512_4vnniw avx512_4fmaps avx512_vp2intersect avx512_fp16 avx512_bf16"},
	{"avx512bw", "avx512_fp16 avx512vbmi avx512_vbmi2"},
	{"xfd", "amx_tile"},
	{"amx_tile", "amx_bf16 amx_int8 amx_fp16"},
	{"kvm_async_pf", "kvm_async_pf_vmexit kvm_async_pf_int"},
}

// stateComponents are the parts of the XSAVE area and the features that have
// them (Intel SDM 1, 13.1). The first two, x87 and SSE, are always there.
var stateComponents = []struct {
	component int
	features  string // any of them
}{
	{2, "avx"},
	{3, "mpx"}, {4, "mpx"},
	{5, "avx512f"}, {6, "avx512f"}, {7, "avx512f"},
	{9, "pku"},
	{17, "amx_tile"}, {18, "amx_tile"},
	{11, "shstk ibt"}, {12, "shstk"},
	{14, "uintr"},
	{15, "arch_lbr"},
}

// supervisorStates are the components that XCR0 does not have but IA32_XSS.
const supervisorStates = 1<<8 | 1<<10 | 1<<11 | 1<<12 | 1<<13 | 1<<14 | 1<<15 | 1<<16

// XSAVE leaves and sizes (Intel SDM 1, 13.2 and 13.4).
const (
	leafExtended  = 0x7
	leafXSAVE     = 0xd
	leafTile      = 0x1d
	leafTMUL      = 0x1e
	leafExtMax    = 0x80000000
	leafExtVendor = 0x80000021
	stateX87SSE   = 1<<0 | 1<<1
	xsaveLegacy   = 512 + 64 // legacy area and header
)

// aliasEDX are the bits of leaf 0x80000001 that repeat those of leaf 1 on AMD's
// CPUs.
const aliasEDX = 0x0183f3ff

// modelWords are the registers whose bits a model says. The components of
// XSAVE's state are not among them: they follow.
func modelWords() []featureWord {
	return slices.DeleteFunc(featureWords(), func(w featureWord) bool { return w.leaf == leafXSAVE && w.index == 0 })
}

// narrowCPUID leaves of a guest's CPUID only what the model has, and what tells
// nothing of features: names, addresses, caches, topology. What a model has no
// name for goes.
func narrowCPUID(guest []kvm.CPUIDEntry, m CPUModel) []kvm.CPUIDEntry {
	has := m.has()
	states := xsaveStates(has)
	out := make([]kvm.CPUIDEntry, 0, len(guest))
	for _, e := range guest {
		if !staysLeaf(e, has, states) {
			continue
		}
		for _, w := range modelWords() {
			if w.leaf == e.Function && w.index == e.Index {
				w.narrow(&e, has)
			}
		}
		out = append(out, e)
	}
	tidyCPUID(out, states)
	return out
}

// narrow clears what the model lacks.
func (w featureWord) narrow(e *kvm.CPUIDEntry, has map[string]bool) {
	var keep uint32
	for bit, name := range strings.Fields(w.names) {
		if has[name] || slices.Contains(platformFeatures, name) {
			keep |= 1 << bit
		}
	}
	if w.leaf == leafExtFeatures && w.register == regEDX {
		keep |= aliasEDX // as far as leaf 1 has them: see tidyCPUID
	}
	switch w.register {
	case regEAX:
		e.EAX &= keep
	case regEBX:
		e.EBX &= keep
	case regECX:
		e.ECX &= keep
	case regEDX:
		e.EDX &= keep
	}
}

// xsaveStates is the set of state components of a model, none without XSAVE.
func xsaveStates(has map[string]bool) uint32 {
	if !has["xsave"] {
		return 0
	}
	states := uint32(stateX87SSE)
	for _, c := range stateComponents {
		if slices.ContainsFunc(strings.Fields(c.features), func(f string) bool { return has[f] }) {
			states |= 1 << c.component
		}
	}
	return states
}

// staysLeaf tells whether a narrowed guest has a leaf.
func staysLeaf(e kvm.CPUIDEntry, has map[string]bool, states uint32) bool {
	switch f := e.Function; f {
	case leafXSAVE:
		// Sub-leaf 1 belongs to XSAVEOPT and its kin; those from 2 on are components.
		return states != 0 && (e.Index < 2 || e.Index < 32 && states&(1<<e.Index) != 0)
	case leafExtended:
		return e.Index < 2
	case leafTile, leafTMUL:
		return has["amx_tile"]
	case 0, leafFeatures, 0x2, leafCacheIntel, 0x5, 0x6, leafPerfMonitoring, leafTopology, 0x15, 0x16, leafTopologyV2,
		leafHypervisor, leafKVMFeatures, 0x40000010,
		leafExtMax, leafExtFeatures, 0x80000002, 0x80000003, 0x80000004, 0x80000005, 0x80000006, leafExtPower,
		leafExtSizes, leafCacheAMD, leafTopologyAMD, leafExtVendor:
		return true
	}
	return false
}

// tidyCPUID makes the numbers fit the features that are left: the highest
// leaves, the size of the XSAVE area, and AMD's repeated bits.
func tidyCPUID(entries []kvm.CPUIDEntry, states uint32) {
	size := uint32(xsaveLegacy)
	var basic, extended uint32
	more := false
	for _, e := range entries {
		switch {
		case e.Function >= leafExtMax:
			extended = max(extended, e.Function)
		case e.Function < leafHypervisor:
			basic = max(basic, e.Function)
		}
		if e.Function == leafXSAVE && e.Index >= 2 && supervisorStates&(1<<e.Index) == 0 {
			size = max(size, e.EBX+e.EAX)
		}
		more = more || e.Function == leafExtended && e.Index == 1 && e.EAX != 0
	}
	plain := cpuidLeaf(entries, leafFeatures, 0).EDX
	for i := range entries {
		switch e := &entries[i]; {
		case e.Function == 0:
			e.EAX = min(e.EAX, basic)
		case e.Function == leafExtMax:
			e.EAX = min(e.EAX, extended)
		case e.Function == leafExtended && e.Index == 0:
			e.EAX = 0
			if more {
				e.EAX = 1
			}
		case e.Function == leafExtended:
			e.EBX, e.ECX, e.EDX = 0, 0, 0
		case e.Function == leafXSAVE && e.Index == 0:
			e.EAX &= states &^ supervisorStates
			// KVM keeps EBX, the size of what XCR0 enables: at reset, only x87.
			e.EBX, e.ECX, e.EDX = xsaveLegacy, size, 0
		case e.Function == leafXSAVE && e.Index == 1:
			e.ECX &= states & supervisorStates
			e.EBX, e.EDX = xsaveLegacy, 0
			if e.EAX&(1<<3) == 0 { // XSAVES
				e.ECX = 0
			}
		case e.Function == leafExtFeatures:
			e.EDX &= ^uint32(aliasEDX) | plain
		}
	}
}
