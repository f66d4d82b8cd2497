package payload

import (
	"errors"

	"ditto.vm/guest/boot"
	"ditto.vm/memory"
)

// Program is a bare-metal program, assembled and ready to load.
type Program struct {
	Name string
}

// Hello returns a program that writes message to the serial port, byte by
// byte, and ends the machine with status 0.
func Hello(message string) (*Program, error) { return nil, errors.ErrUnsupported }

// Load puts the program into mem and returns how to start it in user mode.
func (p *Program) Load(mem *memory.Space) (*boot.Loaded, error) { return nil, errors.ErrUnsupported }

// ELF returns the program as an ELF file with a PVH entry note.
func (p *Program) ELF() []byte { return nil }
