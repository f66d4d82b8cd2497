package asm

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// instructions pairs what is emitted with its bytes and objdump's words for it.
var instructions = []struct {
	emit  func(*Assembler)
	bytes string // hexadecimal
	text  string // in Intel syntax
}{
	{func(a *Assembler) { a.MovImm(RAX, 0x12345678) }, "b878563412", "mov eax,0x12345678"},
	{func(a *Assembler) { a.MovImm(R9, 0xffffffff) }, "41b9ffffffff", "mov r9d,0xffffffff"},
	{func(a *Assembler) { a.MovImm(RCX, 0x123456789abcdef0) }, "48b9f0debc9a78563412", "movabs rcx,0x123456789abcdef0"},
	{func(a *Assembler) { a.MovImm(R15, 1<<63) }, "49bf0000000000000080", "movabs r15,0x8000000000000000"},
	{func(a *Assembler) { a.Mov(RBX, R12) }, "4c89e3", "mov rbx,r12"},
	{func(a *Assembler) { a.Mov(R14, RDI) }, "4989fe", "mov r14,rdi"},
	{func(a *Assembler) { a.Load(RAX, At(RBP, 0x40)) }, "488b8540000000", "mov rax,QWORD PTR [rbp+0x40]"},
	{func(a *Assembler) { a.Load(R8, At(RSP, 8)) }, "4c8b842408000000", "mov r8,QWORD PTR [rsp+0x8]"},
	{func(a *Assembler) { a.Load(RDX, At(R12, 0)) }, "498b942400000000", "mov rdx,QWORD PTR [r12+0x0]"},
	{func(a *Assembler) { a.Load(RDX, At(R13, 4)) }, "498b9504000000", "mov rdx,QWORD PTR [r13+0x4]"},
	{func(a *Assembler) { a.Load(R10, AtIndex(RSI, RCX, 16)) }, "4c8b94ce10000000", "mov r10,QWORD PTR [rsi+rcx*8+0x10]"},
	{func(a *Assembler) { a.Store(At(RSI, -8), RAX) }, "488986f8ffffff", "mov QWORD PTR [rsi-0x8],rax"},
	{func(a *Assembler) { a.Store(AtIndex(RBP, R9, 0x100), RDX) }, "4a8994cd00010000", "mov QWORD PTR [rbp+r9*8+0x100],rdx"},
	{func(a *Assembler) { a.Store(AtIndex(R12, R12, 0), R12) }, "4f89a4e400000000", "mov QWORD PTR [r12+r12*8+0x0],r12"},
	{func(a *Assembler) { a.LoadByte(RAX, At(RSI, 0)) }, "480fb68600000000", "movzx rax,BYTE PTR [rsi+0x0]"},
	{func(a *Assembler) { a.Lea(RDI, AtIndex(R8, RAX, 1)) }, "498dbcc001000000", "lea rdi,[r8+rax*8+0x1]"},
	{func(a *Assembler) { a.Op(ADD, RAX, R15) }, "4c01f8", "add rax,r15"},
	{func(a *Assembler) { a.Op(OR, RDX, RCX) }, "4809ca", "or rdx,rcx"},
	{func(a *Assembler) { a.Op(AND, R8, R9) }, "4d21c8", "and r8,r9"},
	{func(a *Assembler) { a.Op(SUB, RDI, RSI) }, "4829f7", "sub rdi,rsi"},
	{func(a *Assembler) { a.Op(XOR, RAX, RAX) }, "4831c0", "xor rax,rax"},
	{func(a *Assembler) { a.Op(CMP, R14, RAX) }, "4939c6", "cmp r14,rax"},
	{func(a *Assembler) { a.OpImm(ADD, R13, 1) }, "4981c501000000", "add r13,0x1"},
	{func(a *Assembler) { a.OpImm(SUB, RCX, 0x1000) }, "4881e900100000", "sub rcx,0x1000"},
	{func(a *Assembler) { a.OpImm(AND, RAX, 0xf) }, "4881e00f000000", "and rax,0xf"},
	{func(a *Assembler) { a.OpImm(CMP, RAX, -1) }, "4881f8ffffffff", "cmp rax,0xffffffffffffffff"},
	{func(a *Assembler) { a.OpLoad(ADD, RDX, At(RBP, 0x18)) }, "48039518000000", "add rdx,QWORD PTR [rbp+0x18]"},
	{func(a *Assembler) { a.OpLoad(CMP, R14, At(RBP, 0x20)) }, "4c3bb520000000", "cmp r14,QWORD PTR [rbp+0x20]"},
	{func(a *Assembler) { a.OpStore(ADD, At(RBP, 0x28), RCX) }, "48018d28000000", "add QWORD PTR [rbp+0x28],rcx"},
	{func(a *Assembler) { a.OpStore(CMP, AtIndex(RSI, RCX, 0), RDX) }, "483994ce00000000", "cmp QWORD PTR [rsi+rcx*8+0x0],rdx"},
	{func(a *Assembler) { a.OpMemImm(ADD, At(RBP, 0x30), 1) }, "4881853000000001000000", "add QWORD PTR [rbp+0x30],0x1"},
	{func(a *Assembler) { a.OpMemImm(ADD, AtIndex(RBP, RAX, 0x200), 1) }, "488184c50002000001000000", "add QWORD PTR [rbp+rax*8+0x200],0x1"},
	{func(a *Assembler) { a.OpMemImm(CMP, At(RBP, 8), 0) }, "4881bd0800000000000000", "cmp QWORD PTR [rbp+0x8],0x0"},
	{func(a *Assembler) { a.Test(RBX, RBX) }, "4885db", "test rbx,rbx"},
	{func(a *Assembler) { a.Shl(RDX, 32) }, "48c1e220", "shl rdx,0x20"},
	{func(a *Assembler) { a.Shr(R12, 27) }, "49c1ec1b", "shr r12,0x1b"},
	{func(a *Assembler) { a.Imul(RDX, RDI) }, "480fafd7", "imul rdx,rdi"},
	{func(a *Assembler) { a.Imul(R8, R9) }, "4d0fafc1", "imul r8,r9"},
	{func(a *Assembler) { a.Mul(R10) }, "49f7e2", "mul r10"},
	{func(a *Assembler) { a.Bsr(RAX, RCX) }, "480fbdc1", "bsr rax,rcx"},
	{func(a *Assembler) { a.Ret() }, "c3", "ret"},
	{func(a *Assembler) { a.Rdtsc() }, "0f31", "rdtsc"},
	{func(a *Assembler) { a.Pause() }, "f390", "pause"},
	{func(a *Assembler) { a.InByte() }, "ec", "in al,dx"},
	{func(a *Assembler) { a.OutByte() }, "ee", "out dx,al"},
	{func(a *Assembler) { a.OutLong() }, "ef", "out dx,eax"},
}

func TestEncodings(t *testing.T) {
	for _, test := range instructions {
		a := New(0x1000)
		test.emit(a)
		code, err := a.Finish()
		if err != nil {
			t.Errorf("%s: %v", test.text, err)
		}
		if got := fmt.Sprintf("%x", code); got != test.bytes {
			t.Errorf("%s: %s, want %s", test.text, got, test.bytes)
		}
	}
}

// listing is a line of objdump: address, bytes, instruction.
var listing = regexp.MustCompile(`(?m)^\s+[0-9a-f]+:\t(?:[0-9a-f]{2} )+\s*\t?(.*?)\s*$`)

// TestObjdump asks binutils what the bytes mean.
func TestObjdump(t *testing.T) {
	objdump, err := exec.LookPath("objdump")
	if err != nil {
		t.Skip("objdump is not installed; try: apt-get install binutils")
	}
	a := New(0x1000)
	for _, test := range instructions {
		test.emit(a)
	}
	a.Label("end")
	a.JumpIf(NotBelow, "end")
	a.Jump("end")
	a.Call("end")
	a.MovLabel(R11, "end")
	code, err := a.Finish()
	if err != nil {
		t.Fatal(err)
	}
	var want []string
	for _, test := range instructions {
		want = append(want, test.text)
	}
	end := fmt.Sprintf("%#x", a.Address("end"))
	want = append(want, "jae "+end, "jmp "+end, "call "+end, "mov r11d,"+end)

	path := filepath.Join(t.TempDir(), "code")
	if err := os.WriteFile(path, code, 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(objdump, "-D", "-b", "binary", "-m", "i386:x86-64", "-M", "intel", "--adjust-vma=0x1000", "--insn-width=16", path).CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	lines := listing.FindAllStringSubmatch(string(out), -1)
	if len(lines) != len(want) {
		t.Fatalf("%d instructions, want %d:\n%s", len(lines), len(want), out)
	}
	for i, line := range lines {
		if got := strings.Join(strings.Fields(line[1]), " "); got != want[i] {
			t.Errorf("objdump reads %q, want %q", got, want[i])
		}
	}
}

func TestLabels(t *testing.T) {
	a := New(0x100000)
	a.Jump("forward")
	a.Label("forward")
	a.Jump("forward")
	a.RawLabel("table", 0xea)
	a.Define("table", 0x200000)
	code, err := a.Finish()
	if got, want := fmt.Sprintf("%x", code), "e900000000"+"e9fbffffff"+"ea00002000"; err != nil || got != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
	for name, emit := range map[string]func(*Assembler){
		"undefined":    func(a *Assembler) { a.Jump("nowhere") },
		"twice":        func(a *Assembler) { a.Label("x"); a.Label("x") },
		"too far":      func(a *Assembler) { a.Jump("x"); a.Define("x", 1<<40) },
		"above 2 GiB":  func(a *Assembler) { a.MovLabel(RAX, "x"); a.Define("x", 1<<31) },
		"RSP as index": func(a *Assembler) { a.Load(RAX, AtIndex(RAX, RSP, 0)) },
	} {
		a := New(0)
		emit(a)
		if _, err := a.Finish(); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}
