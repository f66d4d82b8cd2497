// Package pci is the machine's PCI bus: one segment, one bus, up to 32 slots
// with one function each, the host bridge in slot 0 (PCI Local Bus 3.0, PCI
// Express 5.0 7.2.2 for ECAM).
//
//	ports CF8, CFC --+                        +-- BAR windows on the MMIO bus
//	                 +--> Bus --> Endpoint ---+
//	ECAM window -----+    slots   config      +-- MSIX --> devices.MSI (irqfd)
//	                              space
//
// There is no INTx: a function interrupts with MSI-X or not at all.
//
// Ownership: the [Bus] owns the slots and the window that BARs are placed in.
// An [Endpoint] owns its configuration space, where its BARs are mapped, and
// its [MSIX]; the device behind it sees only register accesses inside a BAR.
// The guest may size and move BARs; one that leaves the window, or overlaps
// what is there, is simply not mapped.
package pci
