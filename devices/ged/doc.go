// Package ged is the machine's event and power device: the generic event
// device of hardware-reduced ACPI (ACPI 6.5, 5.6.9), the sleep control and
// status registers (4.8.3.7), the reset register (4.8.3.6) and the VM
// Generation ID.
//
// One MMIO page holds the registers:
//
//	0x000  u32  events    pending events, cleared by reading
//	0x010  u8   sleep control   (type << 2 | enable), type 5 powers off
//	0x011  u8   sleep status    always 0: there is no sleep to wake from
//	0x012  u8   reset           ResetValue resets the machine
//
// The interrupt line is level-triggered and asserted while an event is
// pending, so an event is never lost between two that come close together.
// A change of the generation ID is an event, and the ID is state: a guest that is
// restored twice before it has looked is told once, of the last ID.
//
// The callbacks run on the vCPU thread that wrote the register. They must not
// block and must not call back into the device's memory or wait for a vCPU;
// they hand the request to the VM's own goroutine.
package ged
