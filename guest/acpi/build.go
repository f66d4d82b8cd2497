package acpi

import (
	"fmt"

	"ditto.vm/memory"
)

// Limits of what [Build] describes.
const (
	// MaxCPUs is how many processor devices fit the names in the DSDT and
	// their UIDs the local APIC entries of the MADT.
	MaxCPUs = 255

	busSize   = 1 << 20 // of ECAM, bytes
	maxBuses  = 256
	maxSerial = 9

	alignment = 16 // of every table; the RSDP needs it (ACPI 6.5, 5.2.5.1)
)

// Table is one table at its place in guest memory.
type Table struct {
	Signature string
	GPA       memory.GPA
	Bytes     []byte
}

// Tables is the whole set, the RSDP first.
type Tables struct {
	RSDP   memory.GPA
	Tables []Table
}

// Build makes the tables of the machine that config describes.
func Build(config Config) (*Tables, error) {
	if err := config.check(); err != nil {
		return nil, fmt.Errorf("acpi: %w", err)
	}
	p := placer{next: config.Area.Start, end: config.Area.End()}
	root := p.reserve("RSDP", rsdp(0))
	at := p.place("DSDT", table("DSDT", 2, config.dsdt()))
	entries := []memory.GPA{
		p.place("FACP", config.fadt(at)),
		p.place("APIC", config.madt()),
		p.place("MCFG", config.mcfg()),
	}
	root.Bytes = rsdp(p.place("XSDT", xsdt(entries)))
	if p.next > p.end {
		return nil, fmt.Errorf("acpi: tables need %d bytes, the area at %s has %d", p.next-config.Area.Start, config.Area.Start, config.Area.Size)
	}
	return &Tables{RSDP: root.GPA, Tables: append([]Table{root}, p.tables...)}, nil
}

// Write puts the tables into guest memory.
func (t *Tables) Write(mem *memory.Space) error {
	for _, table := range t.Tables {
		if err := mem.WriteAt(table.Bytes, table.GPA); err != nil {
			return fmt.Errorf("acpi: table %s: %w", table.Signature, err)
		}
	}
	return nil
}

// placer hands out addresses in the area, one after the other.
type placer struct {
	next, end memory.GPA
	tables    []Table
}

// reserve finds a place for a table of the size of b.
func (p *placer) reserve(signature string, b []byte) Table {
	t := Table{Signature: signature, GPA: p.next, Bytes: b}
	p.next += memory.GPA(len(b)+alignment-1) &^ (alignment - 1)
	return t
}

// place adds a finished table and returns its address.
func (p *placer) place(signature string, b []byte) memory.GPA {
	t := p.reserve(signature, b)
	p.tables = append(p.tables, t)
	return t.GPA
}

// check validates what the caller composed.
func (c *Config) check() error {
	switch {
	case c.Area.Size == 0 || c.Area.Start%alignment != 0 || c.Area.Start < 0xe0000 || c.Area.End() > 1<<20:
		return fmt.Errorf("table area [%s, +%#x) is not in the firmware area from 0xe0000 to 1 MiB", c.Area.Start, c.Area.Size)
	case len(c.APICIDs) == 0 || len(c.APICIDs) > MaxCPUs:
		return fmt.Errorf("%d CPUs, not 1 to %d", len(c.APICIDs), MaxCPUs)
	case c.ECAM.Size == 0 || c.ECAM.Size%busSize != 0 || c.ECAM.Size > maxBuses*busSize || c.ECAM.Start%busSize != 0 || !below4G(c.ECAM):
		return fmt.Errorf("ECAM [%s, +%#x) is not whole buses below 4 GiB", c.ECAM.Start, c.ECAM.Size)
	case c.PCIWindow32.Size == 0 || !below4G(c.PCIWindow32):
		return fmt.Errorf("PCI window [%s, +%#x) is not below 4 GiB", c.PCIWindow32.Start, c.PCIWindow32.Size)
	case c.PCIWindow64.Size > 0 && c.PCIWindow64.End() <= c.PCIWindow64.Start:
		return fmt.Errorf("64-bit PCI window [%s, +%#x) wraps", c.PCIWindow64.Start, c.PCIWindow64.Size)
	case !below4G(c.Power.page()) || c.Power.Events == 0 || c.Power.PowerButton == 0:
		return fmt.Errorf("event register at %s, power button event %#x", c.Power.Events, c.Power.PowerButton)
	case c.VMGenID != 0 && (c.Power.VMGenID == 0 || c.Area.Contains(c.VMGenID, 1)):
		return fmt.Errorf("VM generation ID at %s lies in the table area or has no event", c.VMGenID)
	case len(c.Serial) > maxSerial:
		return fmt.Errorf("%d serial ports, more than %d", len(c.Serial), maxSerial)
	}
	return nil
}

// below4G reports whether r lies below 4 GiB.
func below4G(r memory.Range) bool {
	return r.Start < memory.HoleEnd && r.Size <= uint64(memory.HoleEnd-r.Start)
}
