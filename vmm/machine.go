package vmm

import "ditto.vm/memory"

// The machine's fixed addresses. RAM lies where [memory.Layout] puts it; these
// are inside its 32-bit hole or below 1 MiB.
const (
	// pciWindowBase is where 32-bit BARs may lie.
	pciWindowBase memory.GPA = 0xc000_0000
	pciWindowSize uint64     = 0x2000_0000

	// ecamBase is PCI configuration space of bus 0, and the only bus.
	ecamBase memory.GPA = 0xe000_0000
	ecamSize uint64     = 1 << 20

	// gedBase is the register page of the generic event device, with sleep
	// control and reset.
	gedBase memory.GPA = 0xfe00_0000

	ioapicBase memory.GPA = 0xfec0_0000
	lapicBase  memory.GPA = 0xfee0_0000

	// identityMapBase and tssBase are pages that KVM wants on Intel CPUs
	// without unrestricted guests; the three TSS pages follow.
	identityMapBase = 0xfffb_c000
	tssBase         = 0xfffb_d000

	// acpiBase is where the tables lie, the RSDP first; the VMGenID buffer
	// has a page of its own behind them.
	acpiBase    memory.GPA = 0xe_0000
	acpiSize    uint64     = 0x1_f000
	vmGenIDBase memory.GPA = 0xf_f000
)

// Global system interrupts of the platform devices. PCI devices have none:
// they use message-signalled interrupts only.
const (
	gsiSerial = 4
	gsiRTC    = 8
	gsiGED    = 9
)
