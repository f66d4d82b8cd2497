package acpi

import (
	"fmt"

	"ditto.vm/memory"
)

// Notification values (ACPI 6.5, table 5.168 and 5.6.6).
const (
	notifyStatusChange  = 0x80 // device-specific: VM generation ID changed
	notifyButtonPressed = 0x80
)

// sleepTypeOff is the sleep type of S5, which the sleep control register
// expects.
const sleepTypeOff = 5

// dsdt returns the definition block of the machine.
func (c *Config) dsdt() code {
	devices := []code{c.pciRoot(), c.motherboard(), c.eventDevice(), powerButton()}
	for i := range c.APICIDs {
		devices = append(devices, processor(i))
	}
	for i, s := range c.Serial {
		devices = append(devices, serialPort(i, s))
	}
	if c.RTC.Port != 0 {
		devices = append(devices, device("RTC",
			named("_HID", eisaID("PNP0B00")),
			resources(ports(c.RTC.Port, 2), interrupt(c.RTC.GSI, false))))
	}
	if c.VMGenID != 0 {
		devices = append(devices, generationID(c.VMGenID))
	}
	if c.PVPanic != 0 {
		devices = append(devices, device("PEVT",
			named("_HID", text("QEMU0001")),
			named("_STA", integer(0xf)),
			resources(ports(c.PVPanic, 1))))
	}
	return join(
		scope(`\_SB`, devices...),
		named(`\_S5`, list(integer(sleepTypeOff), integer(0), integer(0), integer(0))),
	)
}

// processor describes CPU i, which the MADT knows under the same UID.
func processor(i int) code {
	return device(fmt.Sprintf("C%03X", i),
		named("_HID", text("ACPI0007")),
		named("_UID", integer(uint64(i))))
}

// serialPort describes a 16550A.
func serialPort(i int, s ISADevice) code {
	return device(fmt.Sprintf("COM%d", i+1),
		named("_HID", eisaID("PNP0501")),
		named("_UID", integer(uint64(i))),
		resources(ports(s.Port, 8), interrupt(s.GSI, false)))
}

// powerButton is the control-method power button (4.8.2.2.1.2).
func powerButton() code {
	return device("PWRB", named("_HID", eisaID("PNP0C0C")))
}

// pciRoot is the PCI Express root of segment 0. There is no _PRT: the devices
// have MSI-X only.
func (c *Config) pciRoot() code {
	lastBus := uint16(c.ECAM.Size>>20) - 1
	windows := [][]byte{
		wordSpace(spaceBus, 0, 0, lastBus),
		ports(0xcf8, 8),
		wordSpace(spaceIO, ioEntireRange, 0x0000, 0x0cf7),
		wordSpace(spaceIO, ioEntireRange, 0x0d00, 0xffff),
		dwordMemory(c.PCIWindow32),
	}
	if c.PCIWindow64.Size > 0 {
		windows = append(windows, qwordMemory(c.PCIWindow64))
	}
	return device("PCI0",
		named("_HID", eisaID("PNP0A08")),
		named("_CID", eisaID("PNP0A03")),
		named("_UID", integer(0)),
		named("_SEG", integer(0)),
		named("_BBN", integer(0)),
		resources(windows...),
		pciOSC(),
	)
}

// pciUUID is 33db4d5b-1ff7-401c-9657-7441c03dd766 in the byte order of ToUUID.
var pciUUID = [16]byte{
	0x5b, 0x4d, 0xdb, 0x33, 0xf7, 0x1f, 0x1c, 0x40,
	0x96, 0x57, 0x74, 0x41, 0xc0, 0x3d, 0xd7, 0x66,
}

// pciOSC hands every feature that the OS asks for to it: there is no firmware
// that would keep any (PCI Firmware Specification 3.3, 4.5.1).
func pciOSC() code {
	const unrecognizedUUID, unrecognizedRevision = 1 << 2, 1 << 3
	return method("_OSC", 4,
		createDWordField(arg(3), 0, "CDW1"),
		when(not(equal(arg(0), buffer(pciUUID[:]))),
			setBits("CDW1", unrecognizedUUID),
			ret(arg(3))),
		when(not(equal(arg(1), integer(1))),
			setBits("CDW1", unrecognizedRevision)),
		ret(arg(3)))
}

// motherboard claims ECAM, the register pages and the timer. Linux uses ECAM only when it
// is reserved here (drivers: arch/x86/pci/mmconfig-shared.c).
func (c *Config) motherboard() code {
	claims := [][]byte{fixedMemory(c.ECAM), fixedMemory(c.Power.page())}
	if c.PMTimer != 0 {
		claims = append(claims, ports(c.PMTimer, 4))
	}
	return device("MBRD",
		named("_HID", eisaID("PNP0C02")),
		named("_UID", integer(0)),
		resources(claims...))
}

// page returns the page that holds the event and power registers.
func (p Power) page() memory.Range {
	return memory.Range{Start: p.Events.GFN().GPA(), Size: memory.PageSize}
}

// eventDevice is the generic event device (5.6.9): it reads the pending events,
// which clears them, and notifies their objects. Reading once keeps events that
// come meanwhile for the next interrupt.
func (c *Config) eventDevice() code {
	events := []code{
		store(path("EVTS"), local0()),
		when(bitAnd(local0(), integer(uint64(c.Power.PowerButton))),
			notify(`\_SB.PWRB`, notifyButtonPressed)),
	}
	if c.VMGenID != 0 {
		events = append(events, when(bitAnd(local0(), integer(uint64(c.Power.VMGenID))),
			notify(`\_SB.VGEN`, notifyStatusChange)))
	}
	return device("GED",
		named("_HID", text("ACPI0013")),
		named("_UID", integer(0)),
		resources(interrupt(c.Power.GSI, true)),
		memoryField("EREG", uint64(c.Power.Events), "EVTS"),
		method("_EVT", 1, events...))
}

// generationID describes the VM Generation ID (Microsoft, "Virtual Machine
// Generation ID", and Hyper-V's shorter second identifier).
func generationID(at memory.GPA) code {
	return device("VGEN",
		named("_HID", text("DITT0001")),
		named("_CID", list(text("VM_Gen_Counter"), text("VMGENCTR"))),
		named("_DDN", text("VM_Gen_Counter")),
		named("ADDR", list(integer(uint64(at&0xffffffff)), integer(uint64(at>>32)))))
}
