package asm

import (
	"encoding/binary"
	"math"
)

// MovImm loads a constant, zero-extended from 32 bits when it fits.
func (a *Assembler) MovImm(dst Reg, v uint64) {
	if v <= math.MaxUint32 {
		if dst >= R8 {
			a.Raw(0x41)
		}
		a.Raw(0xb8 | byte(dst&7))
		a.imm32(int32(uint32(v)))
		return
	}
	a.Raw(rex(0, 0, dst), 0xb8|byte(dst&7))
	a.code = binary.LittleEndian.AppendUint64(a.code, v)
}

// MovLabel loads the address of a label.
func (a *Assembler) MovLabel(dst Reg, label string) {
	if dst >= R8 {
		a.Raw(0x41)
	}
	a.RawLabel(label, 0xb8|byte(dst&7))
}

// Mov copies src to dst.
func (a *Assembler) Mov(dst, src Reg) { a.regReg(src, dst, 0x89) }

// Load reads 8 bytes.
func (a *Assembler) Load(dst Reg, m Mem) { a.regMem(dst, m, 0x8b) }

// Store writes 8 bytes.
func (a *Assembler) Store(m Mem, src Reg) { a.regMem(src, m, 0x89) }

// LoadByte reads a byte, zero-extended.
func (a *Assembler) LoadByte(dst Reg, m Mem) { a.regMem(dst, m, 0x0f, 0xb6) }

// Lea computes the address of m.
func (a *Assembler) Lea(dst Reg, m Mem) { a.regMem(dst, m, 0x8d) }

// ALU is an arithmetic operation, numbered as in the opcode map.
type ALU byte

// The operations.
const (
	ADD ALU = 0
	OR  ALU = 1
	AND ALU = 4
	SUB ALU = 5
	XOR ALU = 6
	CMP ALU = 7
)

// Op is dst op= src, or compares them.
func (a *Assembler) Op(op ALU, dst, src Reg) { a.regReg(src, dst, byte(op)<<3|1) }

// OpImm is dst op= v, sign-extended.
func (a *Assembler) OpImm(op ALU, dst Reg, v int32) {
	a.regReg(Reg(op), dst, 0x81)
	a.imm32(v)
}

// OpLoad is dst op= [m].
func (a *Assembler) OpLoad(op ALU, dst Reg, m Mem) { a.regMem(dst, m, byte(op)<<3|3) }

// OpStore is [m] op= src.
func (a *Assembler) OpStore(op ALU, m Mem, src Reg) { a.regMem(src, m, byte(op)<<3|1) }

// OpMemImm is [m] op= v, sign-extended.
func (a *Assembler) OpMemImm(op ALU, m Mem, v int32) {
	a.regMem(Reg(op), m, 0x81)
	a.imm32(v)
}

// Test sets the flags of x AND y.
func (a *Assembler) Test(x, y Reg) { a.regReg(y, x, 0x85) }

// Shl shifts left by n bits.
func (a *Assembler) Shl(r Reg, n byte) { a.regReg(4, r, 0xc1); a.Raw(n) }

// Shr shifts right without sign.
func (a *Assembler) Shr(r Reg, n byte) { a.regReg(5, r, 0xc1); a.Raw(n) }

// Imul is dst *= src, the low half.
func (a *Assembler) Imul(dst, src Reg) { a.regReg(dst, src, 0x0f, 0xaf) }

// Mul is RDX:RAX = RAX * src.
func (a *Assembler) Mul(src Reg) { a.regReg(4, src, 0xf7) }

// Bsr finds the highest set bit of src, which must not be zero.
func (a *Assembler) Bsr(dst, src Reg) { a.regReg(dst, src, 0x0f, 0xbd) }

// Cond is a condition, numbered as in the opcode map.
type Cond byte

// The conditions; Below and Above compare without sign.
const (
	Below    Cond = 0x2
	NotBelow Cond = 0x3
	Equal    Cond = 0x4
	NotEqual Cond = 0x5
	NotAbove Cond = 0x6
	Above    Cond = 0x7
)

// JumpIf jumps when cond holds.
func (a *Assembler) JumpIf(cond Cond, label string) { a.relative(label, 0x0f, 0x80|byte(cond)) }

// Jump jumps.
func (a *Assembler) Jump(label string) { a.relative(label, 0xe9) }

// Call calls.
func (a *Assembler) Call(label string) { a.relative(label, 0xe8) }

// Ret returns.
func (a *Assembler) Ret() { a.Raw(0xc3) }

// Rdtsc reads the time-stamp counter into EDX:EAX.
func (a *Assembler) Rdtsc() { a.Raw(0x0f, 0x31) }

// Pause hints at a spin loop.
func (a *Assembler) Pause() { a.Raw(0xf3, 0x90) }

// InByte reads port DX into AL.
func (a *Assembler) InByte() { a.Raw(0xec) }

// OutByte writes AL to port DX.
func (a *Assembler) OutByte() { a.Raw(0xee) }

// OutLong writes EAX to port DX.
func (a *Assembler) OutLong() { a.Raw(0xef) }
