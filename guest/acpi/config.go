package acpi

import (
	"ditto.vm/memory"
)

// Config describes the machine to its guest.
type Config struct {
	// Area is where the tables are put; the RSDP is at its start. It is
	// 16-byte aligned, in the firmware area from 0xe0000 to 1 MiB, where a
	// kernel that is not told looks for the RSDP. 64 CPUs need 4 KiB.
	Area memory.Range

	// APICIDs holds the local APIC ID of each CPU, the boot CPU first.
	// The ACPI processor UID is the index.
	APICIDs []uint32

	LocalAPIC memory.GPA
	IOAPIC    memory.GPA
	// Overrides are interrupt source overrides: ISA interrupts that are not
	// wired to the GSI of the same number.
	Overrides []Override

	// ECAM is the PCI configuration window of segment 0, 1 MiB a bus, from
	// bus 0.
	ECAM memory.Range
	// PCIWindow32 and PCIWindow64 are where BARs may lie; the second may be
	// empty.
	PCIWindow32, PCIWindow64 memory.Range

	Power   Power
	Serial  []ISADevice // COM1 first
	RTC     ISADevice   // absent when Port is 0
	VMGenID memory.GPA  // of the 16-byte GUID; 0 when absent
	PMTimer uint16      // port of the power management timer; 0 when absent
	PVPanic uint16      // port; 0 when absent
}

// Override is an interrupt source override (ACPI 6.5, 5.2.12.5).
type Override struct {
	Source uint8  // ISA interrupt
	GSI    uint32 // what it is wired to
	Level  bool   // level-triggered, else edge; always active high
}

// ISADevice is a device on I/O ports with an interrupt, edge-triggered and
// active high.
type ISADevice struct {
	Port uint16
	GSI  uint32
}

// Power describes the registers of the generic event device and of the
// hardware-reduced sleep and reset interface (ACPI 6.5, 4.8.3.6 and 4.8.3.7,
// 5.6.9). All lie in MMIO.
type Power struct {
	GSI          uint32     // of the event interrupt, level-triggered
	Events       memory.GPA // 32 bits, pending events, cleared by reading
	SleepControl memory.GPA // 8 bits
	SleepStatus  memory.GPA // 8 bits
	Reset        memory.GPA // 8 bits
	ResetValue   uint8      // what to write there

	PowerButton uint32 // event bit
	VMGenID     uint32 // event bit
}
