package kvm

import "fmt"

// ExitReason is why KVM_RUN returned (KVM API 5).
type ExitReason uint32

// Exit reasons that x86 can produce (include/uapi/linux/kvm.h).
const (
	ExitUnknown       ExitReason = 0
	ExitException     ExitReason = 1
	ExitIO            ExitReason = 2
	ExitHypercall     ExitReason = 3
	ExitDebug         ExitReason = 4
	ExitHLT           ExitReason = 5
	ExitMMIO          ExitReason = 6
	ExitIRQWindowOpen ExitReason = 7
	ExitShutdown      ExitReason = 8
	ExitFailEntry     ExitReason = 9
	ExitInterrupted   ExitReason = 10
	ExitSetTPR        ExitReason = 11
	ExitTPRAccess     ExitReason = 12
	ExitNMI           ExitReason = 16
	ExitInternalError ExitReason = 17
	ExitSystemEvent   ExitReason = 24
	ExitIOAPICEOI     ExitReason = 26
	ExitHyperV        ExitReason = 27
	ExitX86RDMSR      ExitReason = 29
	ExitX86WRMSR      ExitReason = 30
	ExitDirtyRingFull ExitReason = 31
	ExitBusLock       ExitReason = 33
	ExitXen           ExitReason = 34
	ExitNotify        ExitReason = 37
	ExitMemoryFault   ExitReason = 39
)

var exitNames = map[ExitReason]string{
	ExitUnknown: "unknown", ExitException: "exception", ExitIO: "io", ExitHypercall: "hypercall",
	ExitDebug: "debug", ExitHLT: "hlt", ExitMMIO: "mmio", ExitIRQWindowOpen: "irq-window",
	ExitShutdown: "shutdown", ExitFailEntry: "fail-entry", ExitInterrupted: "interrupted",
	ExitSetTPR: "set-tpr", ExitTPRAccess: "tpr-access", ExitNMI: "nmi",
	ExitInternalError: "internal-error", ExitSystemEvent: "system-event", ExitIOAPICEOI: "ioapic-eoi",
	ExitHyperV: "hyperv", ExitX86RDMSR: "rdmsr", ExitX86WRMSR: "wrmsr",
	ExitDirtyRingFull: "dirty-ring-full", ExitBusLock: "bus-lock", ExitXen: "xen",
	ExitNotify: "notify", ExitMemoryFault: "memory-fault",
}

// String returns the reason in the kernel's words, in lower case.
func (r ExitReason) String() string {
	if name, ok := exitNames[r]; ok {
		return name
	}
	return fmt.Sprintf("exit-%d", uint32(r))
}

// MaxExitReason bounds the reasons that a counter per reason must hold.
const MaxExitReason = 64
