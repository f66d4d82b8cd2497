package acpi

import (
	"errors"

	"ditto.vm/memory"
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
func Build(config Config) (*Tables, error) { return nil, errors.New("acpi: not wired yet") }

// Write puts the tables into guest memory.
func (t *Tables) Write(mem *memory.Space) error {
	for _, table := range t.Tables {
		if err := mem.WriteAt(table.Bytes, table.GPA); err != nil {
			return err
		}
	}
	return nil
}
