package trackertest

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload"
	"ditto.vm/memory"
	"ditto.vm/vmm/kvm"
)

// ringEntries is the length of a vCPU's dirty ring.
const ringEntries = 4096

// MachineConfig describes a [Machine].
type MachineConfig struct {
	// Space is the machine's memory, or nil for memory of its own as Memory
	// says. A Space that was given is not closed.
	Space  *memory.Space
	Memory memory.Config
	// Tracker is the kind that is opened.
	Tracker memory.TrackerKind
}

// Machine is the least that runs a memory writer: memory, one vCPU on a thread
// of its own, a tracker, and KVM's statistics. It is built on KVM itself, so that
// nothing of a VMM stands between a tracker and the guest.
type Machine struct {
	Memory  *memory.Space
	Tracker memory.Tracker

	owned bool // Memory
	vm    *kvm.VM
	vcpu  *kvm.VCPU
	ring  *kvm.DirtyRing
	stats *kvm.Stats

	started bool
	tid     atomic.Int32
	stop    atomic.Bool
	ended   chan struct{} // closed when the vCPU's thread is done
	failure error         // why it ended, valid then
}

// OpenMachine makes a machine that is stopped, with its tracker open. The error
// wraps [memory.ErrUnsupported] where kernel or KVM lack the tracker.
func OpenMachine(config MachineConfig) (m *Machine, err error) {
	m = &Machine{Memory: config.Space, owned: config.Space == nil, ended: make(chan struct{})}
	defer func() {
		if err != nil {
			err = errors.Join(err, m.Close())
		}
	}()
	system, err := kvm.Open()
	if err != nil {
		return m, err
	}
	defer system.Close()
	if m.owned {
		if m.Memory, err = memory.New(config.Memory); err != nil {
			return m, err
		}
	}
	if m.vm, err = system.CreateVM(); err != nil {
		return m, err
	}
	for _, r := range m.Memory.Regions() {
		if err := m.vm.SetMemslot(kvm.Memslot{Slot: r.Slot, GPA: uint64(r.Start), Size: r.Size, HVA: uint64(r.HVA)}); err != nil {
			return m, err
		}
	}
	host, err := m.openVCPU(system, config.Tracker == memory.TrackerKVMRing)
	if err != nil {
		return m, err
	}
	m.Tracker, _, err = memory.OpenTracker(m.Memory, config.Tracker, host)
	return m, err
}

// openVCPU makes the vCPU, with a dirty ring if asked, and returns what trackers
// can have of KVM.
func (m *Machine) openVCPU(system *kvm.System, ring bool) (memory.TrackerHost, error) {
	host := memory.TrackerHost{Log: m.vm}
	if ring {
		if err := m.vm.EnableDirtyRings(ringEntries); errors.Is(err, unix.EOPNOTSUPP) {
			return host, &memory.TrackerError{Kind: memory.TrackerKVMRing, Reason: "KVM lacks dirty rings", Err: err}
		} else if err != nil {
			return host, err
		}
	}
	cpuid, err := system.SupportedCPUID()
	if err != nil {
		return host, err
	}
	if m.vcpu, err = m.vm.CreateVCPU(0); err != nil {
		return host, err
	}
	if err := m.vcpu.SetCPUID(cpuid); err != nil {
		return host, err
	}
	if m.stats, err = m.vm.StatsFD(); err != nil {
		return host, err
	}
	if ring {
		if m.ring, err = m.vcpu.DirtyRing(ringEntries); err != nil {
			return host, err
		}
		host = memory.TrackerHost{Ring: m.vm, Rings: []memory.DirtyRing{m.ring}}
	}
	return host, nil
}

// Close ends the vCPU's thread and gives everything back.
func (m *Machine) Close() error {
	var errs []error
	if m.started {
		errs = append(errs, m.Stop())
	}
	if m.Tracker != nil {
		m.Memory.SetObserver(nil)
		errs = append(errs, m.Tracker.Close())
	}
	if m.stats != nil {
		errs = append(errs, m.stats.Close())
	}
	if m.ring != nil {
		errs = append(errs, m.ring.Close())
	}
	if m.vcpu != nil {
		errs = append(errs, m.vcpu.Close())
	}
	if m.vm != nil {
		errs = append(errs, m.vm.Close())
	}
	if m.owned && m.Memory != nil {
		errs = append(errs, m.Memory.Close())
	}
	return errors.Join(errs...)
}

// Stop ends the vCPU's thread wherever the guest is.
func (m *Machine) Stop() error {
	m.kill()
	return m.failure
}

// kickEvery is how often a vCPU that is to end is told so: one signal may come
// before it has entered the guest.
const kickEvery = time.Millisecond

// kill ends the vCPU's thread wherever the guest is, and joins it.
func (m *Machine) kill() {
	m.stop.Store(true)
	tick := time.NewTicker(kickEvery)
	defer tick.Stop()
	for {
		select {
		case <-m.ended:
			return
		case <-tick.C:
			m.vcpu.SetImmediateExit(true)
			if tid := m.tid.Load(); tid != 0 {
				_ = unix.Tgkill(unix.Getpid(), int(tid), unix.SIGURG)
			}
		}
	}
}

// Load puts a memory writer into the machine.
func (m *Machine) Load(c payload.MemWriterConfig) error {
	p, err := payload.MemWriter(c)
	if err != nil {
		return err
	}
	khz, err := m.vcpu.TSCKHz()
	if err != nil {
		return err
	}
	p.TSCHz = 1000 * khz
	loaded, err := p.Load(m.Memory)
	if err != nil {
		return err
	}
	e := loaded.Entry
	s, err := m.vcpu.Sregs()
	if err != nil {
		return err
	}
	data := segment(e.Data)
	s.CS, s.TR, s.LDT = segment(e.CS), segment(e.TR), segment(e.LDT)
	s.DS, s.ES, s.FS, s.GS, s.SS = data, data, data, data, data
	s.GDT = kvm.Descriptor{Base: e.GDT.Base, Limit: e.GDT.Limit}
	s.CR0, s.CR3, s.CR4, s.EFER = e.CR0, e.CR3, e.CR4, e.EFER
	return errors.Join(m.vcpu.SetSregs(s), m.vcpu.SetRegs(kvm.Regs{RIP: e.RIP, RSP: e.RSP, RFLAGS: e.RFLAGS}))
}

func segment(s boot.Segment) kvm.Segment {
	bit := map[bool]uint8{true: 1}
	return kvm.Segment{
		Base: s.Base, Limit: s.Limit, Selector: s.Selector, Typ: s.Type, DPL: s.DPL,
		Present: bit[s.Present], DB: bit[s.DB], S: bit[s.S], L: bit[s.L], G: bit[s.G], Unusable: bit[!s.Present],
	}
}

// Start runs the vCPU on a thread of its own until the program ends.
func (m *Machine) Start() {
	m.started = true
	go func() {
		defer close(m.ended)
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		m.tid.Store(int32(unix.Gettid()))
		for more := true; more && m.failure == nil && !m.stop.Load(); {
			more, m.failure = m.step()
		}
	}()
}

// I/O ports of the programs.
const (
	portExit  = 0xf4
	uartReady = 0x60 // ready to send, nothing to say
)

// step enters the guest, handles one exit and reports whether to go on.
func (m *Machine) step() (bool, error) {
	if err := m.vcpu.Run(); errors.Is(err, kvm.ErrInterrupted) {
		return true, nil
	} else if err != nil {
		return false, err
	}
	switch reason := m.vcpu.ExitReason(); reason {
	case kvm.ExitDirtyRingFull:
		return true, m.Tracker.(*memory.KVMRing).RingFull()
	case kvm.ExitIO:
		io := m.vcpu.IO()
		if !io.Out {
			io.Data[0] = uartReady
		}
		return io.Port != portExit, nil
	default:
		return false, fmt.Errorf("the vCPU left the guest: %s", reason)
	}
}

// Command gives the program a command and waits until it has obeyed and is in
// the state in which the command leaves it.
func (m *Machine) Command(ctx context.Context, c payload.Command, until payload.State) (payload.MemWriterStatus, error) {
	was, err := payload.ReadMemWriter(m.Memory)
	if err != nil {
		return was, err
	}
	if err := payload.CommandMemWriter(m.Memory, c); err != nil {
		return was, err
	}
	return m.Await(ctx, func(s payload.MemWriterStatus) bool {
		return s.State == until && (c != payload.CommandCheck || s.Checks != was.Checks)
	})
}

// Await waits until the program's status is as wanted.
func (m *Machine) Await(ctx context.Context, wanted func(payload.MemWriterStatus) bool) (payload.MemWriterStatus, error) {
	for {
		s, err := payload.ReadMemWriter(m.Memory)
		if err != nil || wanted(s) {
			return s, err
		}
		select {
		case <-m.ended:
			// It may have got there with its last step.
			s, err := payload.ReadMemWriter(m.Memory)
			if err == nil && !wanted(s) {
				err = fmt.Errorf("the guest ended in state %+v", s)
			}
			return s, errors.Join(err, m.failure)
		case <-ctx.Done():
			return s, fmt.Errorf("the guest is in state %+v: %w", s, context.Cause(ctx))
		default:
			runtime.Gosched()
		}
	}
}

// Finish ends the program, which checks its memory first, and fails when that
// is not what it wrote.
func (m *Machine) Finish(ctx context.Context) (payload.MemWriterStatus, error) {
	s, err := m.Command(ctx, payload.CommandFinish, payload.StateDone)
	if err != nil {
		return s, err
	}
	<-m.ended
	if s.Errors != 0 {
		return s, fmt.Errorf("the guest found %d errors in its memory, the first in page %d", s.Errors, s.FirstBad)
	}
	return s, m.failure
}

// Mapped returns how many entries of 4 KiB and of 2 MiB KVM maps guest memory
// with (KVM API 4.133, pages_4k and pages_2m).
func (m *Machine) Mapped() (small, large uint64, err error) {
	values, err := m.stats.Read()
	if err != nil {
		return 0, 0, err
	}
	return values["pages_4k"], values["pages_2m"], nil
}
