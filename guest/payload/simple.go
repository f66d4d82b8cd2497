package payload

import (
	"fmt"

	"ditto.vm/guest/payload/asm"
)

// maxMessage bounds what Hello says, in bytes.
const maxMessage = 4096

// Hello returns a program that writes message to the UART, byte by byte, and
// ends the machine with status 0. Its third instruction writes the first byte.
func Hello(message string) (*Program, error) {
	if len(message) > maxMessage {
		return nil, fmt.Errorf("payload hello: message of %d bytes is longer than %d", len(message), maxMessage)
	}
	return &Program{name: "hello", emit: func(a *asm.Assembler) {
		a.MovImm(asm.RDX, portData)
		for _, c := range []byte(message) {
			a.MovImm(asm.RAX, uint64(c))
			a.OutByte()
		}
		emitExit(a, 0)
	}}, nil
}

// Halt returns a program that ends the machine with status at once.
func Halt(status uint32) *Program {
	return &Program{name: "halt", emit: func(a *asm.Assembler) { emitExit(a, status) }}
}

// Spin returns a program that counts in RAX and in the first 8 bytes of the
// status page, and never ends.
func Spin() *Program {
	return &Program{name: "spin", emit: func(a *asm.Assembler) {
		a.MovImm(asm.RBP, uint64(statusPage))
		a.Op(asm.XOR, asm.RAX, asm.RAX)
		a.Label("again")
		a.OpImm(asm.ADD, asm.RAX, 1)
		a.Store(asm.At(asm.RBP, 0), asm.RAX)
		a.Jump("again")
	}}
}

// emitExit ends the machine with a status, and spins where nobody listens.
func emitExit(a *asm.Assembler, status uint32) {
	a.MovImm(asm.RAX, uint64(status))
	emitExitRAX(a)
}

// emitExitRAX ends the machine with the status in EAX.
func emitExitRAX(a *asm.Assembler) {
	a.MovImm(asm.RDX, portExit)
	a.OutLong()
	a.Label("ended")
	a.Pause()
	a.Jump("ended")
}
