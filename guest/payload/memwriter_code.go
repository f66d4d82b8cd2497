package payload

import (
	"ditto.vm/guest/payload/asm"
)

// status is the operand of a word of the status page, whose address is in RBP.
func status(word int) asm.Mem { return asm.At(asm.RBP, int32(8*word)) }

// emitMemWriter emits the memory writer. Registers that live across steps:
//
//	RBP  status page      R14  writes so far
//	R15  last TSC         R13  next page of the sequential order
//	R12  random state
func emitMemWriter(a *asm.Assembler) {
	a.MovImm(asm.RBP, uint64(statusPage))
	a.Load(asm.R12, status(wordRandom))
	a.Op(asm.XOR, asm.R13, asm.R13)
	a.Op(asm.XOR, asm.R14, asm.R14)
	emitNow(a)
	a.Mov(asm.R15, asm.RAX)
	a.Store(status(wordFirstTSC), asm.RAX)
	a.Store(status(wordNextDue), asm.RAX)
	setState(a, StateRunning)
	a.MovLabel(asm.RSI, "greeting")
	a.Call("puts")

	emitStep(a)
	emitChoose(a)
	emitWrite(a)
	emitStall(a)
	emitCommands(a)
	emitPoll(a)
	emitCheck(a)
	emitReport(a)
	emitText(a)
}

// emitNow reads the time-stamp counter into RAX.
func emitNow(a *asm.Assembler) {
	a.Rdtsc()
	a.Shl(asm.RDX, 32)
	a.Op(asm.OR, asm.RAX, asm.RDX)
}

func setState(a *asm.Assembler, s State) {
	a.MovImm(asm.RAX, uint64(s))
	a.Store(status(wordState), asm.RAX)
}

// emitStep emits the head of the loop: measure the gap, obey, wait for the rate.
// It falls through to the choice of a page.
func emitStep(a *asm.Assembler) {
	a.Label("step")
	emitNow(a)
	a.Mov(asm.RCX, asm.RAX)
	a.Op(asm.SUB, asm.RCX, asm.R15)
	a.Mov(asm.R15, asm.RAX)
	a.Store(status(wordLastTSC), asm.RAX)
	a.OpLoad(asm.CMP, asm.RCX, status(wordStallMin))
	a.JumpIf(asm.NotBelow, "stall")
	a.Label("stalled")

	a.OpMemImm(asm.CMP, status(wordCommand), int32(CommandRun))
	a.JumpIf(asm.NotEqual, "command")
	a.OpLoad(asm.CMP, asm.R15, status(wordNextPoll))
	a.JumpIf(asm.NotBelow, "poll")
	a.Label("polled")
	a.Load(asm.RBX, status(wordLimit))
	a.Test(asm.RBX, asm.RBX)
	a.JumpIf(asm.Equal, "unlimited")
	a.Op(asm.CMP, asm.R14, asm.RBX)
	a.JumpIf(asm.NotBelow, "finish")
	a.Label("unlimited")
	a.Load(asm.RBX, status(wordNextCheck))
	a.Test(asm.RBX, asm.RBX)
	a.JumpIf(asm.Equal, "unchecked")
	a.Op(asm.CMP, asm.R14, asm.RBX)
	a.JumpIf(asm.NotBelow, "checkNow")
	a.Label("unchecked")
	a.Load(asm.RBX, status(wordFill))
	a.Test(asm.RBX, asm.RBX)
	a.JumpIf(asm.Equal, "filled")
	a.Op(asm.CMP, asm.R14, asm.RBX)
	a.JumpIf(asm.Below, "next")
	a.OpMemImm(asm.AND, status(wordFill), 0)
	a.MovLabel(asm.RSI, "fillEnd")
	a.Call("puts")
	a.Jump("resync")
	a.Label("filled")

	// The rate: a write is due every interval. One that is more than 64
	// intervals late, after a pause perhaps, starts a new count.
	a.Load(asm.RBX, status(wordInterval))
	a.Test(asm.RBX, asm.RBX)
	a.JumpIf(asm.Equal, "choose")
	a.Load(asm.RCX, status(wordNextDue))
	a.Op(asm.CMP, asm.R15, asm.RCX)
	a.JumpIf(asm.Below, "wait")
	a.Mov(asm.RDX, asm.R15)
	a.Op(asm.SUB, asm.RDX, asm.RCX)
	a.Shr(asm.RDX, 6)
	a.Op(asm.CMP, asm.RDX, asm.RBX)
	a.JumpIf(asm.NotAbove, "due")
	a.Mov(asm.RCX, asm.R15)
	a.Label("due")
	a.Op(asm.ADD, asm.RCX, asm.RBX)
	a.Store(status(wordNextDue), asm.RCX)
}

// emitChoose emits the choice of the next page, into RDI.
func emitChoose(a *asm.Assembler) {
	a.Label("choose")
	a.OpMemImm(asm.CMP, status(wordOrder), int32(Sequential))
	a.JumpIf(asm.NotEqual, "shuffle")
	a.Label("next")
	a.Mov(asm.RDI, asm.R13)
	a.OpImm(asm.ADD, asm.R13, 1)
	a.OpLoad(asm.CMP, asm.R13, status(wordPages))
	a.JumpIf(asm.Below, "write")
	a.Op(asm.XOR, asm.R13, asm.R13)
	a.Jump("write")

	// xorshift64* (Vigna), of which the high bits are good: the page is the
	// high half of random * pages.
	a.Label("shuffle")
	for _, shift := range []struct {
		by func(asm.Reg, byte)
		n  byte
	}{{a.Shr, 12}, {a.Shl, 25}, {a.Shr, 27}} {
		a.Mov(asm.RAX, asm.R12)
		shift.by(asm.RAX, shift.n)
		a.Op(asm.XOR, asm.R12, asm.RAX)
	}
	a.MovImm(asm.RAX, 0x2545f4914f6cdd1d)
	a.Imul(asm.RAX, asm.R12)
	a.Load(asm.RBX, status(wordPages))
	a.OpMemImm(asm.CMP, status(wordOrder), int32(Hot))
	a.JumpIf(asm.NotEqual, "scale")
	a.Mov(asm.RCX, asm.RAX)
	a.OpImm(asm.AND, asm.RCX, 0xf)
	a.JumpIf(asm.Equal, "scale")
	a.Load(asm.RBX, status(wordHotPages))
	a.Label("scale")
	a.Mul(asm.RBX)
	a.Mov(asm.RDI, asm.RDX)
}

// emitWrite emits the write of page RDI and the end of a step.
func emitWrite(a *asm.Assembler) {
	a.Label("write")
	a.Call("address")
	a.Load(asm.RAX, asm.At(asm.RSI, 0))
	a.OpImm(asm.ADD, asm.RAX, 1)
	a.Call("mix")
	a.MovImm(asm.RCX, 1)
	a.Label("word")
	a.OpLoad(asm.CMP, asm.RCX, status(wordWords))
	a.JumpIf(asm.NotBelow, "written")
	a.Op(asm.ADD, asm.RDX, asm.R9)
	a.Store(asm.AtIndex(asm.RSI, asm.RCX, 0), asm.RDX)
	a.OpImm(asm.ADD, asm.RCX, 1)
	a.Jump("word")
	a.Label("written")
	a.Store(asm.At(asm.RSI, 0), asm.RAX)
	a.OpImm(asm.ADD, asm.R14, 1)
	a.Store(status(wordWrites), asm.R14)
	a.Jump("step")

	a.Label("wait")
	a.Pause()
	a.Jump("step")

	// address: the address of page RDI into RSI.
	a.Label("address")
	a.Mov(asm.RSI, asm.RDI)
	a.OpLoad(asm.CMP, asm.RSI, status(wordLowPages))
	a.JumpIf(asm.NotBelow, "high")
	a.Shl(asm.RSI, 12)
	a.OpLoad(asm.ADD, asm.RSI, status(wordLowStart))
	a.Ret()
	a.Label("high")
	a.OpLoad(asm.SUB, asm.RSI, status(wordLowPages))
	a.Shl(asm.RSI, 12)
	a.OpLoad(asm.ADD, asm.RSI, status(wordHighStart))
	a.Ret()

	// mix: first value of page RDI in generation RAX into RDX, step into R9;
	// uses RCX. Generation 0 is a page of zeros.
	a.Label("mix")
	a.Op(asm.XOR, asm.RDX, asm.RDX)
	a.Op(asm.XOR, asm.R9, asm.R9)
	a.Test(asm.RAX, asm.RAX)
	a.JumpIf(asm.Equal, "mixed")
	a.MovImm(asm.RDX, mixPage)
	a.Imul(asm.RDX, asm.RDI)
	a.OpLoad(asm.ADD, asm.RDX, status(wordSeed))
	a.MovImm(asm.RCX, mixGeneration)
	a.Imul(asm.RCX, asm.RAX)
	a.Op(asm.ADD, asm.RDX, asm.RCX)
	a.MovImm(asm.R9, mixStep)
	a.Label("mixed")
	a.Ret()
}

// emitStall emits the counting of a gap of RCX cycles.
func emitStall(a *asm.Assembler) {
	a.Label("stall")
	a.OpMemImm(asm.ADD, status(wordStalls), 1)
	a.OpStore(asm.ADD, status(wordStallCycles), asm.RCX)
	a.Bsr(asm.RAX, asm.RCX)
	a.OpMemImm(asm.ADD, asm.AtIndex(asm.RBP, asm.RAX, 8*wordHistogram), 1)
	a.OpLoad(asm.CMP, asm.RCX, status(wordMaxGap))
	a.JumpIf(asm.NotAbove, "stalled")
	a.Store(status(wordMaxGap), asm.RCX)
	a.Jump("stalled")
}
