package asm

import (
	"encoding/binary"
	"fmt"
	"math"
)

// Reg is a 64-bit general register, numbered as in ModR/M and REX.
type Reg uint8

// The registers.
const (
	RAX Reg = iota
	RCX
	RDX
	RBX
	RSP
	RBP
	RSI
	RDI
	R8
	R9
	R10
	R11
	R12
	R13
	R14
	R15
)

// Mem is a memory operand: [Base + Disp], or [Base + Index*8 + Disp] with
// Indexed.
type Mem struct {
	Base    Reg
	Index   Reg // not RSP
	Indexed bool
	Disp    int32
}

// At is [base + disp].
func At(base Reg, disp int32) Mem { return Mem{Base: base, Disp: disp} }

// AtIndex is [base + index*8 + disp].
func AtIndex(base, index Reg, disp int32) Mem {
	return Mem{Base: base, Index: index, Indexed: true, Disp: disp}
}

// fixup is a place that waits for the address of a label.
type fixup struct {
	at       int // in code
	label    string
	relative bool // to the end of the four bytes, else absolute
}

// Assembler collects code that will run at a fixed address.
type Assembler struct {
	base   uint64
	code   []byte
	labels map[string]uint64
	fixups []fixup
	err    error
}

// New starts a program at the address base.
func New(base uint64) *Assembler {
	return &Assembler{base: base, labels: map[string]uint64{}}
}

// Here returns the address of what is emitted next.
func (a *Assembler) Here() uint64 { return a.base + uint64(len(a.code)) }

// Label names the address of what is emitted next.
func (a *Assembler) Label(name string) { a.Define(name, a.Here()) }

// Define names an address.
func (a *Assembler) Define(name string, address uint64) {
	if _, ok := a.labels[name]; ok {
		a.fail(fmt.Errorf("asm: label %q is defined twice", name))
	}
	a.labels[name] = address
}

// Address returns the address of a label, once Finish has succeeded.
func (a *Assembler) Address(name string) uint64 { return a.labels[name] }

// Finish resolves the labels and returns the code.
func (a *Assembler) Finish() ([]byte, error) {
	for _, f := range a.fixups {
		target, ok := a.labels[f.label]
		if !ok {
			a.fail(fmt.Errorf("asm: label %q is not defined", f.label))
			break
		}
		v := int64(target)
		if f.relative {
			v -= int64(a.base) + int64(f.at) + 4
			if v != int64(int32(v)) {
				a.fail(fmt.Errorf("asm: label %q is too far away", f.label))
			}
		} else if target > math.MaxInt32 {
			a.fail(fmt.Errorf("asm: label %q is above 2 GiB", f.label))
		}
		binary.LittleEndian.PutUint32(a.code[f.at:], uint32(v))
	}
	return a.code, a.err
}

// fail keeps the first error for Finish.
func (a *Assembler) fail(err error) {
	if a.err == nil {
		a.err = err
	}
}

// Raw emits bytes: data, or an instruction that stands for itself.
func (a *Assembler) Raw(b ...byte) { a.code = append(a.code, b...) }

// RawLabel emits bytes that end in the 32-bit absolute address of a label.
func (a *Assembler) RawLabel(label string, b ...byte) {
	a.Raw(b...)
	a.fixups = append(a.fixups, fixup{at: len(a.code), label: label})
	a.Raw(0, 0, 0, 0)
}

// relative emits an opcode and the distance to a label.
func (a *Assembler) relative(label string, opcode ...byte) {
	a.Raw(opcode...)
	a.fixups = append(a.fixups, fixup{at: len(a.code), label: label, relative: true})
	a.Raw(0, 0, 0, 0)
}

func (a *Assembler) imm32(v int32) {
	a.code = binary.LittleEndian.AppendUint32(a.code, uint32(v))
}

// rex returns the REX.W prefix for a ModR/M reg field, an index and a base.
func rex(reg, index, base Reg) byte {
	return 0x48 | byte(reg>>3)<<2 | byte(index>>3)<<1 | byte(base>>3)
}

// regReg emits REX.W, opcode and a ModR/M of two registers.
func (a *Assembler) regReg(reg, rm Reg, opcode ...byte) {
	a.Raw(rex(reg, 0, rm))
	a.Raw(opcode...)
	a.Raw(0xc0 | byte(reg&7)<<3 | byte(rm&7))
}

// regMem emits REX.W, opcode and a ModR/M with a 32-bit displacement. A SIB
// byte is needed with an index, and with RSP or R12 as the base.
func (a *Assembler) regMem(reg Reg, m Mem, opcode ...byte) {
	const disp32, sib, noIndex, scale8 = 0x80, 4, 4 << 3, 3 << 6
	field := byte(reg&7) << 3
	if m.Indexed {
		if m.Index == RSP {
			a.fail(fmt.Errorf("asm: RSP is no index"))
		}
		a.Raw(rex(reg, m.Index, m.Base))
		a.Raw(opcode...)
		a.Raw(disp32|field|sib, scale8|byte(m.Index&7)<<3|byte(m.Base&7))
	} else {
		a.Raw(rex(reg, 0, m.Base))
		a.Raw(opcode...)
		a.Raw(disp32 | field | byte(m.Base&7))
		if m.Base&7 == sib {
			a.Raw(noIndex | sib)
		}
	}
	a.imm32(m.Disp)
}
