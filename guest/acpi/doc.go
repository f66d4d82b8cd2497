// Package acpi describes the machine to its guest: hardware-reduced ACPI 6.5
// tables, built in Go.
//
//	RSDP -> XSDT -> FADT -> DSDT (AML: CPUs, PCI root, COM1, RTC, events)
//	            |-> MADT (local APICs, IOAPIC, overrides, NMI)
//	            '-> MCFG (ECAM)
//
// The package knows nothing of how the devices work: every address and
// interrupt comes in through [Config]. The tables are plain bytes; the caller
// owns where they go and writes them before the first vCPU runs.
package acpi
