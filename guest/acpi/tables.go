package acpi

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// headerSize is the size of a system description table header (ACPI 6.5,
// table 5.4).
const headerSize = 36

// Identification of who made the tables.
const (
	oemID      = "DITTO "
	oemTableID = "DITTOVM "
	creatorID  = "DITT"
)

// table prefixes body with a header and sets length and checksum.
func table(signature string, revision byte, body []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, headerSize+len(body))
	b = append(b, signature...)
	b = le.AppendUint32(b, uint32(headerSize+len(body)))
	b = append(b, revision, 0)
	b = append(b, oemID...)
	b = append(b, oemTableID...)
	b = le.AppendUint32(b, 1)
	b = append(b, creatorID...)
	b = le.AppendUint32(b, 1)
	b = append(b, body...)
	b[9] = checksum(b)
	return b
}

// checksum returns the byte that makes b sum to zero, given that the checksum
// field of b is zero.
func checksum(b []byte) byte {
	var sum byte
	for _, v := range b {
		sum += v
	}
	return -sum
}

// rsdp returns the root pointer, which points to the XSDT only (5.2.5.3).
func rsdp(xsdt memory.GPA) []byte {
	const size, v1Size = 36, 20
	b := make([]byte, size)
	copy(b, "RSD PTR ")
	copy(b[9:], oemID)
	b[15] = 2 // revision
	binary.LittleEndian.PutUint32(b[20:], size)
	binary.LittleEndian.PutUint64(b[24:], uint64(xsdt))
	b[8] = checksum(b[:v1Size])
	b[32] = checksum(b)
	return b
}

// xsdt lists the other tables (5.2.8).
func xsdt(entries []memory.GPA) []byte {
	var body []byte
	for _, e := range entries {
		body = binary.LittleEndian.AppendUint64(body, uint64(e))
	}
	return table("XSDT", 1, body)
}

// FADT fields (5.2.9), offsets from the start of the table.
const (
	fadtSize          = 276
	fadtDSDT          = 40  // u32
	fadtProfile       = 45  // u8
	fadtBootArch      = 109 // u16
	fadtFlags         = 112 // u32
	fadtResetReg      = 116 // generic address
	fadtResetValue    = 128 // u8
	fadtMinor         = 131 // u8
	fadtXDSDT         = 140 // u64
	fadtSleepControl  = 244 // generic address
	fadtSleepStatus   = 256 // generic address
	fadtHypervisorID  = 268 // u64
	fadtXPMTimer      = 208 // generic address
	fadtRevision      = 6
	fadtMinorVersion  = 3
	profileEnterprise = 4

	// flags
	fadtWBINVD         = 1 << 0
	fadtPowerButton    = 1 << 4 // not a fixed one: a control-method device
	fadtSleepButton    = 1 << 5 // likewise: there is none
	fadtFixedRTC       = 1 << 6 // RTC wake is not in fixed registers
	fadtResetSupported = 1 << 10
	fadtTimer32        = 1 << 8 // the timer has 32 bits
	fadtHWReduced      = 1 << 20

	// IAPC_BOOT_ARCH (table 5.11). The flags for legacy devices and for an
	// 8042 stay clear, so that nobody spends time on probing them.
	bootArchNoVGA = 1 << 2
)

// fadt returns the fixed table of a hardware-reduced machine.
func (c *Config) fadt(dsdt memory.GPA) []byte {
	le := binary.LittleEndian
	b := make([]byte, fadtSize)
	le.PutUint32(b[fadtDSDT:], uint32(dsdt))
	le.PutUint64(b[fadtXDSDT:], uint64(dsdt))
	b[fadtProfile] = profileEnterprise
	le.PutUint16(b[fadtBootArch:], bootArchNoVGA)
	le.PutUint32(b[fadtFlags:], fadtWBINVD|fadtPowerButton|fadtSleepButton|fadtFixedRTC|fadtResetSupported|fadtTimer32|fadtHWReduced)
	putRegister(b[fadtResetReg:], c.Power.Reset)
	b[fadtResetValue] = c.Power.ResetValue
	b[fadtMinor] = fadtMinorVersion
	putRegister(b[fadtSleepControl:], c.Power.SleepControl)
	putRegister(b[fadtSleepStatus:], c.Power.SleepStatus)
	if c.PMTimer != 0 {
		// The fixed hardware of a reduced machine is nothing to rely on, but
		// Linux looks for this register whatever the machine is.
		putPort32(b[fadtXPMTimer:], c.PMTimer)
	}
	copy(b[fadtHypervisorID:], "DITTOVM\x00")
	return table("FACP", fadtRevision, b[headerSize:])
}

// putRegister writes the generic address of an 8-bit MMIO register (5.2.3.2).
func putRegister(b []byte, at memory.GPA) {
	const systemMemory, widthBits, byteAccess = 0, 8, 1
	b[0], b[1], b[2], b[3] = systemMemory, widthBits, 0, byteAccess
	binary.LittleEndian.PutUint64(b[4:], uint64(at))
}

// putPort32 writes the generic address of a 32-bit port.
func putPort32(b []byte, port uint16) {
	const systemIO, widthBits, dwordAccess = 1, 32, 3
	b[0], b[1], b[2], b[3] = systemIO, widthBits, 0, dwordAccess
	binary.LittleEndian.PutUint64(b[4:], uint64(port))
}

// MADT entries (5.2.12).
const (
	madtLocalAPIC    = 0
	madtIOAPIC       = 1
	madtOverride     = 2
	madtLocalNMI     = 4
	madtLocalX2APIC  = 9
	madtX2APICNMI    = 10
	madtEnabled      = 1 << 0
	madtPCATCompat   = 1 << 0
	madtRevision     = 5
	maxLocalAPICID   = 0xfe // higher ones need an x2APIC entry
	polarityHigh     = 1
	triggerEdge      = 1 << 2
	triggerLevel     = 3 << 2
	allProcessors8   = 0xff
	allProcessors32  = 0xffffffff
	nmiLocalInterupt = 1 // LINT1
)

// madt lists the interrupt controllers.
func (c *Config) madt() []byte {
	le := binary.LittleEndian
	b := le.AppendUint32(nil, uint32(c.LocalAPIC))
	b = le.AppendUint32(b, madtPCATCompat) // KVM's irqchip has two 8259s
	x2apic := false
	for uid, id := range c.APICIDs {
		if id <= maxLocalAPICID {
			b = append(b, madtLocalAPIC, 8, byte(uid), byte(id))
			b = le.AppendUint32(b, madtEnabled)
			continue
		}
		x2apic = true
		b = append(b, madtLocalX2APIC, 16, 0, 0)
		b = le.AppendUint32(b, id)
		b = le.AppendUint32(b, madtEnabled)
		b = le.AppendUint32(b, uint32(uid))
	}
	b = append(b, madtIOAPIC, 12, ioapicID, 0)
	b = le.AppendUint32(b, uint32(c.IOAPIC))
	b = le.AppendUint32(b, 0) // first GSI
	for _, o := range c.Overrides {
		flags := uint16(polarityHigh | triggerEdge)
		if o.Level {
			flags = polarityHigh | triggerLevel
		}
		b = append(b, madtOverride, 10, 0, o.Source)
		b = le.AppendUint32(b, o.GSI)
		b = le.AppendUint16(b, flags)
	}
	b = append(b, madtLocalNMI, 6, allProcessors8, 0, 0, nmiLocalInterupt)
	if x2apic {
		b = append(b, madtX2APICNMI, 12, 0, 0)
		b = le.AppendUint32(b, allProcessors32)
		b = append(b, nmiLocalInterupt, 0, 0, 0)
	}
	return table("APIC", madtRevision, b)
}

// ioapicID is the ID of KVM's IOAPIC after a reset.
const ioapicID = 0

// mcfg tells where ECAM lies (PCI Firmware Specification 3.3, 4.1.2).
func (c *Config) mcfg() []byte {
	le := binary.LittleEndian
	b := make([]byte, 8, 24) // reserved
	b = le.AppendUint64(b, uint64(c.ECAM.Start))
	b = le.AppendUint16(b, 0)                             // segment
	b = append(b, 0, byte(c.ECAM.Size>>20-1), 0, 0, 0, 0) // first and last bus, reserved
	return table("MCFG", 1, b)
}
