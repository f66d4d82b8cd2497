package trackertest_test

import (
	"errors"
	"os"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload"
	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

const (
	page  = memory.PageSize
	frame = memory.LargeFrameSize

	ringEntries = 4096
	// reserved is the top of RAM, where the VMM writes and the guest does not.
	reserved = 8 << 20
	// guestStart is where the guest's working set begins.
	guestStart = 4 << 20
)

// machine is a memory writer on one vCPU and its tracker.
type machine struct {
	t       testing.TB
	mem     *memory.Space
	vm      *kvm.VM
	vcpu    *kvm.VCPU
	ring    *kvm.DirtyRing
	stats   *kvm.Stats
	tracker memory.Tracker

	ended chan struct{} // closed when the vCPU's thread is done
}

// newMachine makes a machine that is stopped, with the tracker open. Without
// KVM, or without the tracker, the test is skipped.
func newMachine(t testing.TB, config memory.Config, kind memory.TrackerKind) *machine {
	t.Helper()
	system, err := kvm.Open()
	if err != nil {
		skipOrFail(t, err, "run as a member of the kvm group on a machine with KVM")
	}
	defer system.Close()
	m := &machine{t: t, ended: make(chan struct{})}
	check := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	m.mem, err = memory.New(config)
	check(err)
	m.vm, err = system.CreateVM()
	check(err)
	for _, r := range m.mem.Regions() {
		check(m.vm.SetMemslot(kvm.Memslot{Slot: r.Slot, GPA: uint64(r.Start), Size: r.Size, HVA: uint64(r.HVA)}))
	}
	if kind == memory.TrackerKVMRing {
		if err := m.vm.EnableDirtyRings(ringEntries); err != nil {
			skipOrFail(t, err, "a KVM with KVM_CAP_DIRTY_LOG_RING")
		}
	}
	m.vcpu, err = m.vm.CreateVCPU(0)
	check(err)
	cpuid, err := system.SupportedCPUID()
	check(err)
	check(m.vcpu.SetCPUID(cpuid))
	m.stats, err = m.vm.StatsFD()
	check(err)
	host := memory.TrackerHost{Log: m.vm}
	if kind == memory.TrackerKVMRing {
		m.ring, err = m.vcpu.DirtyRing(ringEntries)
		check(err)
		host = memory.TrackerHost{Ring: m.vm, Rings: []memory.DirtyRing{m.ring}}
	}
	m.tracker, _, err = memory.OpenTracker(m.mem, kind, host)
	if errors.Is(err, memory.ErrUnsupported) {
		skipOrFail(t, err, "Linux 6.7 or newer")
	}
	check(err)
	t.Cleanup(m.close)
	return m
}

// skipOrFail skips with the cure, or fails when KVM is required.
func skipOrFail(t testing.TB, err error, cure string) {
	t.Helper()
	if os.Getenv("DITTO_REQUIRE_KVM") != "" && !errors.Is(err, unix.EOPNOTSUPP) {
		t.Fatal(err)
	}
	t.Skipf("%v; try: %s", err, cure)
}

func (m *machine) close() {
	m.mem.SetObserver(nil)
	err := errors.Join(m.tracker.Close(), m.stats.Close())
	if m.ring != nil {
		err = errors.Join(err, m.ring.Close())
	}
	if err := errors.Join(err, m.vcpu.Close(), m.vm.Close(), m.mem.Close()); err != nil {
		m.t.Error(err)
	}
}

// load puts a memory writer into the machine.
func (m *machine) load(c payload.MemWriterConfig) {
	m.t.Helper()
	p, err := payload.MemWriter(c)
	if err != nil {
		m.t.Fatal(err)
	}
	hz, err := m.vcpu.TSCKHz()
	if err != nil {
		m.t.Fatal(err)
	}
	p.TSCHz = 1000 * hz
	loaded, err := p.Load(m.mem)
	if err != nil {
		m.t.Fatal(err)
	}
	e := loaded.Entry
	s, err := m.vcpu.Sregs()
	if err != nil {
		m.t.Fatal(err)
	}
	data := segment(e.Data)
	s.CS, s.TR, s.LDT = segment(e.CS), segment(e.TR), segment(e.LDT)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.GDT = kvm.Descriptor{Base: e.GDT.Base, Limit: e.GDT.Limit}
	s.CR0, s.CR3, s.CR4, s.EFER = e.CR0, e.CR3, e.CR4, e.EFER
	regs := kvm.Regs{RIP: e.RIP, RSP: e.RSP, RFLAGS: e.RFLAGS}
	if err := errors.Join(m.vcpu.SetSregs(s), m.vcpu.SetRegs(regs)); err != nil {
		m.t.Fatal(err)
	}
}

func segment(s boot.Segment) kvm.Segment {
	bit := map[bool]uint8{true: 1}
	return kvm.Segment{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type, DPL: s.DPL,
		Present: bit[s.Present], DB: bit[s.DB], S: bit[s.S], L: bit[s.L], G: bit[s.G], Unusable: bit[!s.Present],
	}
}

// start runs the vCPU on a thread of its own until the program ends.
func (m *machine) start() {
	go func() {
		defer close(m.ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		for m.step() {
		}
	}()
}

// step handles one exit and reports whether to go on.
func (m *machine) step() bool {
	if err := m.vcpu.Run(); errors.Is(err, kvm.ErrInterrupted) {
		return true
	} else if err != nil {
		m.t.Error(err)
		return false
	}
	switch reason := m.vcpu.ExitReason(); reason {
	case kvm.ExitDirtyRingFull:
		if err := m.tracker.(*memory.KVMRing).RingFull(); err != nil {
			m.t.Error(err)
			return false
		}
		return true
	case kvm.ExitIO:
		io := m.vcpu.IO()
		if !io.Out {
			io.Data[0] = 0x60 // the UART is ready to send and has nothing to say
		}
		return io.Port != 0xf4
	default:
		m.t.Errorf("exit %s", reason)
		return false
	}
}

// command gives the program a command and waits until it has obeyed.
func (m *machine) command(c payload.Command, until payload.State) payload.MemWriterStatus {
	m.t.Helper()
	if err := payload.CommandMemWriter(m.mem, c); err != nil {
		m.t.Fatal(err)
	}
	return m.await(func(s payload.MemWriterStatus) bool { return s.State == until })
}

// await waits until the program's status is as wanted.
func (m *machine) await(wanted func(payload.MemWriterStatus) bool) payload.MemWriterStatus {
	m.t.Helper()
	for {
		s, err := payload.ReadMemWriter(m.mem)
		if err != nil {
			m.t.Fatal(err)
		}
		if wanted(s) {
			return s
		}
		select {
		case <-m.ended:
			if s, err := payload.ReadMemWriter(m.mem); err != nil || !wanted(s) {
				m.t.Fatalf("the guest ended in state %+v, %v", s, err)
			}
		default:
			runtime.Gosched()
		}
	}
}

// finish ends the program, which checks its memory first.
func (m *machine) finish() {
	m.t.Helper()
	s := m.command(payload.CommandFinish, payload.StateDone)
	<-m.ended
	if s.Errors != 0 {
		m.t.Errorf("the guest found %d errors in its memory", s.Errors)
	}
}

// largeInKVM returns how many 2 MiB entries KVM maps guest memory with.
func (m *machine) largeInKVM() uint64 {
	m.t.Helper()
	values, err := m.stats.Read()
	if err != nil {
		m.t.Fatal(err)
	}
	return values["pages_2m"]
}
