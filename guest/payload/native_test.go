package payload_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload"
	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// guest is the smallest machine that runs a payload: RAM, one vCPU, a UART
// that is always ready and the exit port.
type guest struct {
	t      testing.TB
	mem    *memory.Space
	vcpu   *kvm.VCPU
	output bytes.Buffer
	input  []byte
	// onPoll is called when the program looks for input.
	onPoll func()
	// stop makes run return.
	stop bool
}

// newGuest makes a machine with size bytes of RAM.
func newGuest(t testing.TB, size uint64) *guest {
	t.Helper()
	return newGuestWith(t, memory.Config{Size: size})
}

func newGuestWith(t testing.TB, config memory.Config) *guest {
	t.Helper()
	system, err := kvm.Open()
	if err != nil {
		if os.Getenv("DITTO_REQUIRE_KVM") != "" {
			t.Fatal(err)
		}
		t.Skipf("%v; try: run as a member of the kvm group on a machine with KVM", err)
	}
	defer system.Close()
	mem, err := memory.New(config)
	if err != nil {
		t.Fatal(err)
	}
	vm, err := system.CreateVM()
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range mem.Regions() {
		if err := vm.SetMemslot(kvm.Memslot{Slot: r.Slot, GPA: uint64(r.Start), Size: r.Size, HVA: uint64(r.HVA)}); err != nil {
			t.Fatal(err)
		}
	}
	runtime.LockOSThread() // a vCPU belongs to its thread
	vcpu, err := vm.CreateVCPU(0)
	if err != nil {
		t.Fatal(err)
	}
	cpuid, err := system.SupportedCPUID()
	if err != nil {
		t.Fatal(err)
	}
	if err := vcpu.SetCPUID(cpuid); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(vcpu.Close(), vm.Close(), mem.Close()); err != nil {
			t.Error(err)
		}
		runtime.UnlockOSThread()
	})
	return &guest{t: t, mem: mem, vcpu: vcpu}
}

// enter sets the vCPU to the entry state.
func (g *guest) enter(e boot.Entry) {
	g.t.Helper()
	s, err := g.vcpu.Sregs()
	if err != nil {
		g.t.Fatal(err)
	}
	convert := func(s boot.Segment) kvm.Segment {
		bit := map[bool]uint8{true: 1}
		return kvm.Segment{
			Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type, DPL: s.DPL,
			Present: bit[s.Present], DB: bit[s.DB], S: bit[s.S], L: bit[s.L], G: bit[s.G], Unusable: bit[!s.Present],
		}
	}
	data := convert(e.Data)
	s.CS, s.TR, s.LDT = convert(e.CS), convert(e.TR), convert(e.LDT)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.GDT = kvm.Descriptor{Base: e.GDT.Base, Limit: e.GDT.Limit}
	s.IDT = kvm.Descriptor{Base: e.IDT.Base, Limit: e.IDT.Limit}
	s.CR0, s.CR3, s.CR4, s.EFER = e.CR0, e.CR3, e.CR4, e.EFER
	regs := kvm.Regs{RIP: e.RIP, RSP: e.RSP, RBX: e.RBX, RSI: e.RSI, RDI: e.RDI, RFLAGS: e.RFLAGS}
	if err := errors.Join(g.vcpu.SetSregs(s), g.vcpu.SetRegs(regs)); err != nil {
		g.t.Fatal(err)
	}
}

// run runs the guest until it writes the exit port, and returns the status, or
// until stop is set.
func (g *guest) run() uint32 {
	g.t.Helper()
	for !g.stop {
		if err := g.vcpu.Run(); err != nil && !errors.Is(err, kvm.ErrInterrupted) {
			g.t.Fatal(err)
		} else if err != nil {
			continue
		}
		if reason := g.vcpu.ExitReason(); reason != kvm.ExitIO {
			regs, _ := g.vcpu.Regs()
			suberror, data := g.vcpu.InternalError()
			g.t.Fatalf("exit %s at %#x, internal error %d %x, output %q", reason, regs.RIP, suberror, data, g.output.String())
		}
		io := g.vcpu.IO()
		switch {
		case io.Port == 0x3f8 && io.Out:
			g.output.Write(io.Data)
		case io.Port == 0x3f8 && len(g.input) > 0:
			io.Data[0], g.input = g.input[0], g.input[1:]
		case io.Port == 0x3fd && !io.Out:
			if g.onPoll != nil && bytes.HasSuffix(g.output.Bytes(), []byte("\n")) {
				g.onPoll()
			}
			io.Data[0] = 0x60
			if len(g.input) > 0 {
				io.Data[0] |= 1
			}
		case io.Port == 0xf4 && io.Out:
			return uint32(io.Data[0]) | uint32(io.Data[1])<<8 | uint32(io.Data[2])<<16 | uint32(io.Data[3])<<24
		default:
			g.t.Fatalf("access to port %#x, out %t", io.Port, io.Out)
		}
	}
	return 0
}

// start loads a program and sets the vCPU to its entry.
func (g *guest) start(p *payload.Program) {
	g.t.Helper()
	loaded, err := p.Load(g.mem)
	if err != nil {
		g.t.Fatal(err)
	}
	g.enter(loaded.Entry)
}

func parse(t testing.TB, spec string) *payload.Program {
	t.Helper()
	p, err := payload.Parse(spec)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestHelloRuns(t *testing.T) {
	g := newGuest(t, 4<<20)
	g.start(parse(t, "hello:ditto"))
	if status := g.run(); status != 0 || g.output.String() != "ditto\n" {
		t.Errorf("status %d, output %q", status, g.output.String())
	}
}

func TestHaltRuns(t *testing.T) {
	g := newGuest(t, 4<<20)
	g.start(parse(t, "halt:77"))
	if status := g.run(); status != 77 {
		t.Errorf("status %d", status)
	}
}

// TestPVHEntryRuns starts the ELF file by PVH: 32-bit mode, the stub, CPL 3.
func TestPVHEntryRuns(t *testing.T) {
	g := newGuest(t, 16<<20)
	elf, err := parse(t, "hello:by PVH").ELF(16 << 20)
	if err != nil {
		t.Fatal(err)
	}
	loaded, err := boot.Load(g.mem, boot.Config{Kernel: &boot.Image{Name: "hello", Reader: bytes.NewReader(elf), Size: int64(len(elf))}})
	if err != nil {
		t.Fatal(err)
	}
	g.enter(loaded.Entry)
	if status := g.run(); status != 0 || g.output.String() != "by PVH\n" {
		t.Errorf("status %d, output %q", status, g.output.String())
	}
}

func TestMemWriterRuns(t *testing.T) {
	for _, spec := range []string{
		"size=8M,limit=10000", "size=8M,limit=5000,order=random,seed=42,words=1",
		"size=8M,limit=20000,order=hot,words=8,check=7000", "limit=100,words=512", "size=4K,limit=3",
		"size=8M,fill,limit=10000,order=random,words=8",
	} {
		t.Run(spec, func(t *testing.T) {
			g := newGuest(t, 16<<20)
			g.start(parse(t, "memwriter:"+spec))
			if status := g.run(); status != 0 {
				t.Errorf("status %d", status)
			}
			s, err := payload.ReadMemWriter(g.mem)
			if err != nil {
				t.Fatal(err)
			}
			if s.State != payload.StateDone || s.Writes == 0 || s.Errors != 0 || s.Checks == 0 || s.RanCycles == 0 {
				t.Errorf("status %+v", s)
			}
			if wrong, err := payload.VerifyMemWriter(g.mem); wrong != 0 || err != nil {
				t.Errorf("from outside %d pages are wrong, %v", wrong, err)
			}
			if !strings.Contains(g.output.String(), "errors=0000000000000000") {
				t.Errorf("output %q", g.output.String())
			}
		})
	}
}

// TestMemWriterFills: every page is written before the order and the rate begin.
func TestMemWriterFills(t *testing.T) {
	g := newGuest(t, 16<<20)
	g.start(parse(t, "memwriter:size=8M,fill,limit=2200,order=hot,words=8"))
	if status := g.run(); status != 0 || !strings.Contains(g.output.String(), payload.FilledLine) {
		t.Fatalf("status %d, output %q", status, g.output.String())
	}
	b, err := g.mem.View(4<<20, 8<<20)
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(b); at += memory.PageSize {
		if binary.LittleEndian.Uint64(b[at:]) == 0 {
			t.Fatalf("the page at %#x was not written", at)
		}
	}
}

// TestMemWriterAboveTheHole uses RAM on both sides of the 32-bit hole.
func TestMemWriterAboveTheHole(t *testing.T) {
	g := newGuestWith(t, memory.Config{Size: 4 << 30, HugePages: memory.HugePagesOff})
	p := parse(t, "memwriter:order=random,words=2,rate=20000")
	p.TSCHz = 1e9
	g.start(p)
	polls := 0
	g.onPoll = func() {
		polls++
		g.stop = polls == 2
	}
	g.run()
	if wrong, err := payload.VerifyMemWriter(g.mem); wrong != 0 || err != nil {
		t.Errorf("%d pages are wrong, %v", wrong, err)
	}
	b, err := g.mem.View(memory.HoleEnd, 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	written := 0
	for at := 0; at < len(b); at += memory.PageSize {
		if b[at] != 0 {
			written++
		}
	}
	if written == 0 { // how many depends on the machine's speed
		t.Error("no page above 4 GiB was written")
	}
}

// TestMemWriterNoticesDamage changes memory behind the program's back, which
// must notice when it is told to check, and so must the check from outside.
func TestMemWriterNoticesDamage(t *testing.T) {
	page := func(n int) memory.GPA { return memory.GPA(4<<20 + n*memory.PageSize) }
	read := func(g *guest, n int) []byte {
		b := make([]byte, memory.PageSize)
		if err := g.mem.ReadAt(b, page(n)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	write := func(g *guest, n int, b []byte) {
		if err := g.mem.WriteAt(b, page(n)); err != nil {
			t.Fatal(err)
		}
	}
	for name, damage := range map[string]func(g *guest, before []byte){
		"a word":     func(g *guest, _ []byte) { b := read(g, 5); b[808] ^= 1; write(g, 5, b) },
		"lost page":  func(g *guest, _ []byte) { write(g, 7, make([]byte, memory.PageSize)) },
		"wrong page": func(g *guest, _ []byte) { write(g, 8, read(g, 9)) },
		"stale page": func(g *guest, before []byte) { write(g, 3, before) },
	} {
		t.Run(name, func(t *testing.T) {
			g := newGuest(t, 16<<20)
			g.start(parse(t, "memwriter:size=4M"))
			var before []byte
			polls := 0
			g.onPoll = func() {
				switch polls++; polls {
				case 2:
					before = read(g, 3)
				case 3:
					if wrong, err := payload.VerifyMemWriter(g.mem); wrong != 0 || err != nil {
						t.Errorf("before the damage: %d pages wrong, %v", wrong, err)
					}
					damage(g, before)
					if wrong, err := payload.VerifyMemWriter(g.mem); wrong == 0 && err == nil {
						t.Error("not noticed from outside")
					}
					g.input = []byte("q")
				}
			}
			if status := g.run(); status != 1 {
				t.Errorf("status %d: not noticed by the program", status)
			}
			if s, err := payload.ReadMemWriter(g.mem); err != nil || s.Errors == 0 {
				t.Errorf("status %+v, %v", s, err)
			}
		})
	}
}

// TestMemWriterObeys pauses, checks, resumes and finishes by the status page.
func TestMemWriterObeys(t *testing.T) {
	g := newGuest(t, 16<<20)
	p := parse(t, "memwriter:size=1M,rate=100000")
	p.TSCHz = 1e9
	g.start(p)
	command := func(c payload.Command) {
		if err := payload.CommandMemWriter(g.mem, c); err != nil {
			t.Fatal(err)
		}
	}
	var reports []string
	polls := 0
	g.onPoll = func() {
		polls++
		switch polls {
		case 2:
			g.input = []byte("sc?")
		case 6:
			command(payload.CommandFinish)
		}
	}
	if status := g.run(); status != 0 {
		t.Errorf("status %d", status)
	}
	for line := range strings.Lines(g.output.String()) {
		if strings.HasPrefix(line, "memwriter writes=") {
			reports = append(reports, line)
		}
	}
	if len(reports) != 3 || reports[0] >= reports[1] || !strings.Contains(reports[1], "checks=0000000000000001") || !strings.Contains(reports[2], "checks=0000000000000002") {
		t.Errorf("reports %q", reports)
	}
	s, err := payload.ReadMemWriter(g.mem)
	if err != nil {
		t.Fatal(err)
	}
	// The rate is an upper bound; how far below it the host keeps the guest
	// is not for a test to say.
	if limit := uint64(s.Ran.Seconds()*100000) + 70; s.Writes == 0 || s.Writes > limit {
		t.Errorf("%d writes in %s at 100000 a second", s.Writes, s.Ran)
	}
}

// TestPVHInQEMU starts the ELF files by QEMU's own PVH loader.
func TestPVHInQEMU(t *testing.T) {
	if testing.Short() {
		t.Skip("QEMU's firmware takes seconds; try: without -short")
	}
	qemu, err := exec.LookPath("qemu-system-x86_64")
	if err != nil {
		t.Skip("QEMU is not installed; try: apt-get install qemu-system-x86")
	}
	newGuest(t, 2<<20) // or skip
	for spec, want := range map[string]struct {
		output string
		status int
	}{
		"halt:9":                         {"", 19},
		"memwriter:size=16M,limit=20000": {"errors=0000000000000000", 1},
	} {
		t.Run(spec, func(t *testing.T) {
			elf, err := parse(t, spec).ELF(64 << 20)
			if err != nil {
				t.Fatal(err)
			}
			path := filepath.Join(t.TempDir(), "payload.elf")
			if err := os.WriteFile(path, elf, 0o600); err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := exec.CommandContext(ctx, qemu, "-M", "microvm", "-accel", "kvm", "-cpu", "qemu64,-svm", "-m", "64",
				"-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio", "-no-reboot",
				"-device", "isa-debug-exit,iobase=0xf4,iosize=4", "-kernel", path)
			out, err := cmd.CombinedOutput()
			var exit *exec.ExitError
			if !errors.As(err, &exit) || exit.ExitCode() != want.status || !bytes.Contains(out, []byte(want.output)) {
				t.Errorf("%v, output %q, want exit status %d", err, out, want.status)
			}
		})
	}
}
