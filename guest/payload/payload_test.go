package payload

import (
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/guest/boot"
	"ditto.vm/memory"

	"github.com/google/go-cmp/cmp"
)

func TestParse(t *testing.T) {
	for spec, want := range map[string]string{
		"hello": "hello", "hello:a b": "hello", "halt": "halt", "halt:5": "halt", "spin": "spin", "memwriter": "memwriter",
		"memwriter:size=64M,order=random,words=8,rate=1000,limit=5,seed=0x10,check=3,stall=1ms": "memwriter",
	} {
		if p, err := Parse(spec); err != nil || p.Name() != want {
			t.Errorf("%q: %v", spec, err)
		}
	}
	for _, spec := range []string{
		"", "nothing", "halt:x", "halt:99999999999", "hello:" + strings.Repeat("x", 5000),
		"memwriter:size", "memwriter:size=3", "memwriter:size=1T", "memwriter:size=99999999G", "memwriter:order=up",
		"memwriter:words=513", "memwriter:fill=yes", "memwriter:words=-1", "memwriter:stall=-1s", "memwriter:color=red",
	} {
		if _, err := Parse(spec); err == nil || strings.ContainsRune(err.Error(), '\n') {
			t.Errorf("%.40q: %v", spec, err)
		}
	}
	got, err := parseMemWriter("size=64M,order=hot,words=8,rate=1000,limit=5,seed=0x10,check=3,stall=1ms")
	want := MemWriterConfig{
		WorkingSet: 64 << 20, Order: Hot, Words: 8, Rate: 1000, Limit: 5, Seed: 16, CheckEvery: 3, Stall: time.Millisecond,
	}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Error(err, diff)
	}
}

func TestWorkingSetPlacement(t *testing.T) {
	const mib = 1 << 20
	for _, test := range []struct {
		ram, want uint64
		low, high memory.Range
		err       error
	}{
		{ram: 16 * mib, low: memory.Range{Start: 4 * mib, Size: 12 * mib}},
		{ram: 16 * mib, want: mib, low: memory.Range{Start: 4 * mib, Size: mib}},
		{ram: 16 * mib, want: 13 * mib, err: boot.ErrNoRoom},
		{ram: 4 * mib, err: boot.ErrNoRoom},
		{ram: 4096 * mib, low: memory.Range{Start: 4 * mib, Size: 3068 * mib}, high: memory.Range{Start: 4096 * mib, Size: 1024 * mib}},
		{ram: 4096 * mib, want: 3070 * mib, low: memory.Range{Start: 4 * mib, Size: 3068 * mib}, high: memory.Range{Start: 4096 * mib, Size: 2 * mib}},
	} {
		ram, err := memory.Layout(test.ram)
		if err != nil {
			t.Fatal(err)
		}
		low, high, err := (&MemWriterConfig{WorkingSet: test.want}).place(ram)
		if !errors.Is(err, test.err) {
			t.Errorf("%+v: %v", test, err)
		}
		if test.err == nil && (low != test.low || high.Size != test.high.Size || high.Size > 0 && high.Start != test.high.Start) {
			t.Errorf("%+v: low %+v, high %+v", test, low, high)
		}
	}
}

func TestMemWriterNeedsTheFrequency(t *testing.T) {
	p, err := MemWriter(MemWriterConfig{Rate: 1000})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := p.ELF(16 << 20); err == nil {
		t.Error("a rate without a frequency was accepted")
	}
	p.TSCHz = 2e9
	ram, _ := memory.Layout(16 << 20)
	b, err := p.prepare(ram)
	if err != nil {
		t.Fatal(err)
	}
	word := func(n int) uint64 { return binary.LittleEndian.Uint64(b[8*n:]) }
	if word(wordInterval) != 2e6 || word(wordStallMin) != 2e5 || word(wordPollEvery) != 2e8 {
		t.Errorf("interval %d, stall %d, poll %d", word(wordInterval), word(wordStallMin), word(wordPollEvery))
	}
}

func TestTooLittleMemory(t *testing.T) {
	mem, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if _, err := Spin().Load(mem); !errors.Is(err, boot.ErrNoRoom) {
		t.Error(err)
	}
	if _, err := Spin().ELF(600 << 30); !errors.Is(err, boot.ErrNoRoom) {
		t.Error(err)
	}
	if _, err := Spin().ELF(5); err == nil {
		t.Error("five bytes of RAM")
	}
	if _, err := ReadMemWriter(mem); err == nil {
		t.Error("status of no program")
	}
}

func TestStatusOfAnotherProgram(t *testing.T) {
	mem, err := memory.New(memory.Config{Size: 2 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer mem.Close()
	if _, err := Spin().Load(mem); err != nil {
		t.Fatal(err)
	}
	_, statusErr := ReadMemWriter(mem)
	_, verifyErr := VerifyMemWriter(mem)
	for _, err := range []error{statusErr, verifyErr, CommandMemWriter(mem, CommandPause)} {
		if !errors.Is(err, ErrNoMemWriter) {
			t.Error(err)
		}
	}
}

func TestIdentityMap(t *testing.T) {
	const at = 0x200000
	b, err := identityMap(at, 5<<30)
	if err != nil || len(b) != 7*memory.PageSize {
		t.Fatalf("%d bytes, %v", len(b), err)
	}
	entry := func(table, i uint64) uint64 {
		return binary.LittleEndian.Uint64(b[table-at+8*i:])
	}
	for va := uint64(0); va < 5<<30; va += 37<<20 + 4097 {
		pml4e := entry(at, va>>39)
		pdpte := entry(pml4e&^0xfff, va>>30&511)
		pde := entry(pdpte&^0xfff, va>>21&511)
		if pml4e&pdpte&pde&7 != 7 || pde&pteLarge == 0 || pde&^0x1fffff != va&^0x1fffff {
			t.Fatalf("%#x: %#x %#x %#x", va, pml4e, pdpte, pde)
		}
	}
}

// TestStub asks binutils what the hand-assembled PVH entry says.
func TestStub(t *testing.T) {
	objdump, err := exec.LookPath("objdump")
	if err != nil {
		t.Skip("objdump is not installed; try: apt-get install binutils")
	}
	ram, _ := memory.Layout(16 << 20)
	image, err := Halt(0).assemble(ram)
	if err != nil {
		t.Fatal(err)
	}
	stub := image.bytes[image.stub-uint64(imageBase) : image.tables-uint64(imageBase)]
	// A far jump leads from the 32-bit half to the 64-bit half.
	const jump, jumpSize = 0x2d, 7
	if target := uint64(binary.LittleEndian.Uint32(stub[jump+1:])); stub[jump] != 0xea || target != image.stub+jump+jumpSize {
		t.Fatalf("jump to %#x in % x", target, stub)
	}
	disassemble := func(mode string) string {
		half := stub[:jump+jumpSize]
		if mode != "i386" {
			half = stub[len(half):]
		}
		path := filepath.Join(t.TempDir(), "stub")
		if err := os.WriteFile(path, half, 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command(objdump, "-D", "-b", "binary", "-m", mode, "-M", "intel", "--no-show-raw-insn", path).Output()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(strings.Fields(string(out)), " ")
	}
	for mode, words := range map[string][]string{
		"i386": {
			"lgdtd ds:0x100080", "mov cr3,eax", "mov eax,0x620", "mov cr4,eax", "mov ecx,0xc0000080",
			"mov eax,0x101", "xor edx,edx", "wrmsr", "mov eax,0x80010033", "mov cr0,eax", "jmp 0x10:",
		},
		"i386:x86-64": {
			"mov eax,0x40", "ltr ax", "mov eax,0x2b", "mov ds,eax", "mov es,eax", "mov fs,eax", "mov gs,eax",
			"mov ecx,0xc0000081", "xor eax,eax", "mov edx,0x200010", "wrmsr", "mov ecx,0x102000", "mov r11d,0x3002",
			"mov esp,0x100ff0", "sysretq",
		},
	} {
		text := disassemble(mode)
		at := 0
		for _, w := range words {
			i := strings.Index(text[at:], w)
			if i < 0 {
				t.Fatalf("%s: no %q after %q", mode, w, text[at:min(at+300, len(text))])
			}
			at += i + len(w)
		}
	}
}

// FuzzParse: whatever is asked for is refused, or assembles, or does not fit.
func FuzzParse(f *testing.F) {
	for _, spec := range []string{"hello:x", "halt:7", "spin", "memwriter:size=4M,order=hot,words=3,limit=9,seed=1,check=2,stall=1us"} {
		f.Add(spec)
	}
	ram, _ := memory.Layout(16 << 20)
	f.Fuzz(func(t *testing.T, spec string) {
		p, err := Parse(spec)
		if err != nil {
			return
		}
		p.TSCHz = 1e9
		if _, err := p.assemble(ram); err != nil && !errors.Is(err, boot.ErrNoRoom) {
			t.Fatal(err)
		}
	})
}
