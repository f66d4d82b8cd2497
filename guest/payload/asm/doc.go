// Package asm assembles the few x86-64 instructions that ditto's bare-metal
// payloads are made of (Intel SDM volume 2). It knows one encoding of each and
// no optimization; what it emits is checked against objdump in its tests.
//
//	a := asm.New(0x100000)
//	a.MovImm(asm.RDX, 0x3f8)
//	a.Label("again")
//	a.OutByte()
//	a.Jump("again")
//	code, err := a.Finish()
package asm
