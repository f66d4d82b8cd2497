package payload

import (
	"fmt"

	"ditto.vm/guest/payload/asm"
)

// emitCommands emits what the host can ask for on the status page.
func emitCommands(a *asm.Assembler) {
	a.Label("command")
	a.Load(asm.RAX, status(wordCommand))
	a.OpImm(asm.CMP, asm.RAX, int32(CommandFinish))
	a.JumpIf(asm.Equal, "finish")
	a.OpImm(asm.CMP, asm.RAX, int32(CommandCheck))
	a.JumpIf(asm.NotEqual, "pause")
	a.Call("check")
	a.MovImm(asm.RAX, uint64(CommandPause))
	a.Store(status(wordCommand), asm.RAX)
	a.Label("pause")
	setState(a, StatePaused)
	a.Label("paused")
	a.Pause()
	a.OpMemImm(asm.CMP, status(wordCommand), int32(CommandPause))
	a.JumpIf(asm.Equal, "paused")
	setState(a, StateRunning)
	a.Jump("resync")

	a.Label("checkNow")
	a.Call("check")
	a.Load(asm.RAX, status(wordCheckEvery))
	a.Op(asm.ADD, asm.RAX, asm.R14)
	a.Store(status(wordNextCheck), asm.RAX)

	// resync: go on without counting what was spent here as a gap.
	a.Label("resync")
	emitNow(a)
	a.Mov(asm.R15, asm.RAX)
	a.Jump("step")

	a.Label("finish")
	a.Call("check")
	a.Call("report")
	setState(a, StateDone)
	a.Op(asm.XOR, asm.RAX, asm.RAX)
	a.OpMemImm(asm.CMP, status(wordErrors), 0)
	a.JumpIf(asm.Equal, "exit")
	a.MovImm(asm.RAX, 1)
	a.Label("exit")
	emitExitRAX(a)
}

// emitPoll emits a look at the UART.
func emitPoll(a *asm.Assembler) {
	a.Label("poll")
	a.Mov(asm.RAX, asm.R15)
	a.OpLoad(asm.ADD, asm.RAX, status(wordPollEvery))
	a.Store(status(wordNextPoll), asm.RAX)
	a.MovImm(asm.RDX, portStatus)
	a.InByte()
	a.OpImm(asm.AND, asm.RAX, 0xff)
	a.OpImm(asm.CMP, asm.RAX, 0xff) // no UART
	a.JumpIf(asm.Equal, "polled")
	a.OpImm(asm.AND, asm.RAX, 1) // data ready
	a.JumpIf(asm.Equal, "polled")
	a.MovImm(asm.RDX, portData)
	a.InByte()
	a.OpImm(asm.AND, asm.RAX, 0xff)
	a.OpImm(asm.CMP, asm.RAX, 'q')
	a.JumpIf(asm.Equal, "finish")
	a.OpImm(asm.CMP, asm.RAX, 's')
	a.JumpIf(asm.Equal, "say")
	a.OpImm(asm.CMP, asm.RAX, 'c')
	a.JumpIf(asm.NotEqual, "resync")
	a.Call("check")
	a.Label("say")
	a.Call("report")
	a.Jump("resync")
}

// emitCheck emits the check of the whole working set: each page against its
// generation, and the sum of the generations against the writes.
func emitCheck(a *asm.Assembler) {
	a.Label("check")
	setState(a, StateChecking)
	a.Op(asm.XOR, asm.RDI, asm.RDI) // page
	a.Op(asm.XOR, asm.R10, asm.R10) // sum
	a.Label("checkPage")
	a.OpLoad(asm.CMP, asm.RDI, status(wordPages))
	a.JumpIf(asm.NotBelow, "checkSum")
	a.Call("address")
	a.Load(asm.RAX, asm.At(asm.RSI, 0))
	a.Op(asm.ADD, asm.R10, asm.RAX)
	a.Call("mix")
	a.MovImm(asm.RCX, 1)
	a.Label("checkWord")
	a.OpLoad(asm.CMP, asm.RCX, status(wordWords))
	a.JumpIf(asm.NotBelow, "checkedPage")
	a.Op(asm.ADD, asm.RDX, asm.R9)
	a.OpStore(asm.CMP, asm.AtIndex(asm.RSI, asm.RCX, 0), asm.RDX)
	a.JumpIf(asm.NotEqual, "wrongPage")
	a.OpImm(asm.ADD, asm.RCX, 1)
	a.Jump("checkWord")

	a.Label("wrongPage")
	a.OpMemImm(asm.ADD, status(wordErrors), 1)
	a.OpMemImm(asm.CMP, status(wordFirstBad), -1) // noPage
	a.JumpIf(asm.NotEqual, "checkedPage")
	a.Store(status(wordFirstBad), asm.RDI)
	a.Label("checkedPage")
	a.OpImm(asm.ADD, asm.RDI, 1)
	a.Jump("checkPage")

	a.Label("checkSum")
	a.Op(asm.CMP, asm.R10, asm.R14)
	a.JumpIf(asm.Equal, "checked")
	a.OpMemImm(asm.ADD, status(wordErrors), 1)
	a.Label("checked")
	a.OpMemImm(asm.ADD, status(wordChecks), 1)
	setState(a, StateRunning)
	a.Ret()
}

// reported are the words that a report says, in hexadecimal.
var reported = []struct {
	name string
	word int
}{
	{"writes", wordWrites}, {"checks", wordChecks}, {"errors", wordErrors},
	{"stalls", wordStalls}, {"stallcycles", wordStallCycles}, {"maxgap", wordMaxGap},
	{"first", wordFirstTSC}, {"last", wordLastTSC},
}

// emitReport emits a line such as "memwriter writes=0000000000001000 ...".
func emitReport(a *asm.Assembler) {
	a.Label("report")
	a.MovLabel(asm.RSI, "name")
	a.Call("puts")
	for i, r := range reported {
		a.MovLabel(asm.RSI, fmt.Sprintf("name%d", i))
		a.Call("puts")
		a.Load(asm.RBX, status(r.word))
		a.Call("putHex")
	}
	a.MovLabel(asm.RSI, "newline")
	a.Call("puts")
	a.Ret()

	// puts: the string at RSI.
	a.Label("puts")
	a.LoadByte(asm.RAX, asm.At(asm.RSI, 0))
	a.Test(asm.RAX, asm.RAX)
	a.JumpIf(asm.Equal, "putsEnd")
	a.Call("putc")
	a.OpImm(asm.ADD, asm.RSI, 1)
	a.Jump("puts")
	a.Label("putsEnd")
	a.Ret()

	// putHex: the 16 digits of RBX.
	a.Label("putHex")
	a.MovImm(asm.R8, 16)
	a.Label("digit")
	a.Mov(asm.RAX, asm.RBX)
	a.Shr(asm.RAX, 60)
	a.Shl(asm.RBX, 4)
	a.OpImm(asm.CMP, asm.RAX, 10)
	a.JumpIf(asm.Below, "decimal")
	a.OpImm(asm.ADD, asm.RAX, 'a'-'0'-10)
	a.Label("decimal")
	a.OpImm(asm.ADD, asm.RAX, '0')
	a.Call("putc")
	a.OpImm(asm.SUB, asm.R8, 1)
	a.JumpIf(asm.NotEqual, "digit")
	a.Ret()

	// putc: the character RAX, when the transmitter takes it; uses R9.
	a.Label("putc")
	a.Mov(asm.R9, asm.RAX)
	a.MovImm(asm.RDX, portStatus)
	a.Label("busy")
	a.InByte()
	a.OpImm(asm.AND, asm.RAX, 0x20)
	a.JumpIf(asm.Equal, "busy")
	a.Mov(asm.RAX, asm.R9)
	a.MovImm(asm.RDX, portData)
	a.OutByte()
	a.Ret()
}

// emitText emits the strings.
func emitText(a *asm.Assembler) {
	text := func(label, s string) {
		a.Label(label)
		a.Raw([]byte(s)...)
		a.Raw(0)
	}
	text("greeting", "memwriter started\n")
	text("fillEnd", FilledLine)
	text("name", "memwriter")
	text("newline", "\n")
	for i, r := range reported {
		text(fmt.Sprintf("name%d", i), " "+r.name+"=")
	}
}
