package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/devices"
	"ditto.vm/guest/boot"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
	"ditto.vm/vmm/naming"
)

// Options are what a VM needs from its surroundings.
type Options struct {
	Log *slog.Logger
	// Console receives what the guest writes to its console. Writes may block
	// for a while; the guest is then slowed down.
	Console io.Writer
	// NetLog receives what the user-mode network logs, nil for nothing.
	NetLog io.Writer
	// Version of ditto, which saved states carry for people.
	Version string
	// Handed is what a VM that arrives had in another process of this host, which
	// is the VM's from now on; nil for one of another host.
	Handed *Handed
}

// VM is one virtual machine. Its methods may be called from any goroutine.
type VM struct {
	cfg     config.Config
	version string // of ditto
	log     *slog.Logger
	sys     *kvm.System
	kvm     *kvm.VM
	mem     *memory.Space
	irqs    *interrupts

	ports, mmio devices.Bus
	unclaimed   atomic.Uint64 // accesses that no device answered

	vcpus      []*vcpu
	cpuid      []kvm.CPUIDEntry
	msrIndices []uint32
	reset0     resetState
	stats      *kvm.Stats

	tracker memory.Tracker      // of naming, if there is any
	ring    *memory.KVMRing     // nil unless the tracker is made of dirty rings
	frames  *memory.Frames      // nil where the kernel lacks PAGEMAP_SCAN
	keeper  *memory.FrameKeeper // nil where frames cannot be made large
	naming  *naming.Naming      // nil when names are switched off

	handed      *Handed         // what is used while it is made
	restored    *restored       // memory that came out of a snapshot; nil if it did not
	learned     *learned        // names that pages came by from another host; nil when none did
	pulled      *memory.Missing // memory that is where a VM came from; nil when none was
	memoryError atomic.Pointer[error]

	source   bootSource
	platform platform
	pci      pciDevices
	disks    []vmDisk // as configured
	cleanup  closers

	requests chan request  // to the supervisor
	resetDue atomic.Bool   // a reset was asked for and its vCPUs still run
	ended    chan struct{} // closed when the guest has ended and all is joined

	mu        sync.Mutex // serializes lifecycle operations; guards what follows
	state     api.State
	closed    bool // Close has begun
	started   time.Time
	loaded    *boot.Loaded
	exit      Exit
	resets    int
	endReason *Exit       // set by the first request to end
	saved     *savedState // what a restored VM begins with; nil once it ran
	saving    bool        // a save or a migration is under way
	parting   bool        // it is saved, and ends unless that fails
	away      bool        // its disks were given up for a migration
	leaving   bool        // a migration is under way
	standing  *standing   // for a migration; nil when it does not

	pauseCalls int // of Pause
	resumes    int

	background background
	looks      looks
	throttle   throttle
}

// request asks the supervisor for what a vCPU thread or worker cannot do
// itself.
type request int

const (
	requestReset request = iota + 1
	requestPowerOff
	requestPanicked
	requestEnd // the reason is already recorded
)

// ExitReason is why a guest has ended.
type ExitReason string

// The reasons.
const (
	ExitPowerOff ExitReason = "poweroff" // the guest powered itself off
	ExitReboot   ExitReason = "reboot"   // it rebooted, and reboots end it
	ExitPanicked ExitReason = "panic"    // its kernel panicked
	ExitKilled   ExitReason = "killed"   // the user ended it
	ExitFailed   ExitReason = "error"    // it could not go on
	ExitStatus   ExitReason = "status"   // a payload ended with a status
	ExitSaved    ExitReason = "saved"    // it was saved, to go on from there
	ExitMigrated ExitReason = "migrated" // it goes on somewhere else
)

// Exit says how a guest ended.
type Exit struct {
	Reason ExitReason
	Status uint32 // of ExitStatus
	Err    error  // of ExitFailed
}

// request hands r to the supervisor. It never blocks: the supervisor is either
// about to serve a request or ending.
func (m *VM) request(r request) {
	if r == requestReset && !m.resetDue.CompareAndSwap(false, true) {
		return // kernels pulse the reset line until they are gone
	}
	select {
	case m.requests <- r:
	case <-m.ended:
	default:
		// A request is queued already; a reset after a reset is one reset,
		// and nothing overtakes an end.
	}
}

// end records why the guest ends, if nothing did before, and asks for it.
func (m *VM) end(e Exit) {
	m.mu.Lock()
	if m.endReason == nil {
		m.endReason = &e
	}
	m.mu.Unlock()
	select {
	case m.requests <- requestEnd:
	case <-m.ended:
	}
}

// vcpuFailed implements [exitHandler].
func (m *VM) vcpuFailed(c *vcpu, err error) {
	err = m.explain(err)
	m.log.Error("guest stopped", "vcpu", c.id, "err", err)
	// The supervisor joins this thread, so it must not wait for it.
	go m.end(Exit{Reason: ExitFailed, Err: err})
}

// Start loads the kernel and lets the guest run.
func (m *VM) Start(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != api.Created {
		return fmt.Errorf("start: VM is %s: %w", m.state, api.ErrWrongState)
	}
	if err := m.load(); err != nil {
		return err
	}
	for _, c := range m.vcpus {
		c.start()
	}
	go m.supervise()
	m.started = time.Now()
	m.state = api.Running
	m.startBackground()
	return m.resumeVCPUs(ctx)
}

// Pause stops the guest: first the vCPUs, then the devices, whose requests in
// flight are finished. Pausing a paused VM does nothing.
func (m *VM) Pause(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.pauseCalls++
	return m.pause(ctx)
}

// pause is Pause. Preconditions: mu is held.
func (m *VM) pause(ctx context.Context) error {
	switch m.state {
	case api.Paused:
		return nil
	case api.Running:
	default:
		return fmt.Errorf("pause: VM is %s: %w", m.state, api.ErrWrongState)
	}
	m.stopBackground() // while the guest still runs: it may take milliseconds
	if err := m.pauseVCPUs(ctx); err != nil {
		m.startBackground()
		return errors.Join(fmt.Errorf("pause: %w", err), m.resumeVCPUs(context.WithoutCancel(ctx)))
	}
	m.pci.pause()
	m.state = api.Paused
	return nil
}

// Resume lets a paused guest run on. The guest's watchdogs are told of the
// pause.
func (m *VM) Resume(ctx context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.resume(ctx)
}

// resume is Resume. Preconditions: mu is held.
func (m *VM) resume(ctx context.Context) error {
	switch m.state {
	case api.Running:
		return nil
	case api.Paused:
	default:
		return fmt.Errorf("resume: VM is %s: %w", m.state, api.ErrWrongState)
	}
	if err := m.mayRun(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	if err := m.beginTime(ctx); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	if err := m.pci.resume(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	if m.saved != nil {
		m.pci.announce()
		if m.saved.opts.AdvanceClock {
			m.background.announcements = moreAnnouncements
		}
		m.saved = nil
	}
	for _, c := range m.vcpus {
		if err := c.do(ctx, c.kvm.KVMClockCtrl); err != nil {
			m.log.Warn("cannot tell the guest of the pause", "vcpu", c.id, "err", err)
		}
	}
	m.state = api.Running
	m.resumes++
	m.startBackground()
	if err := m.resumeVCPUs(ctx); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	return nil
}

// pauseVCPUs brings every vCPU out of the guest. All are kicked before the
// first is waited for. Preconditions: mu is held.
func (m *VM) pauseVCPUs(ctx context.Context) error {
	errs := make(chan error, len(m.vcpus))
	for _, c := range m.vcpus {
		go func() { errs <- c.pause(ctx) }()
	}
	var all error
	for range m.vcpus {
		all = errors.Join(all, <-errs)
	}
	return all
}

// resumeVCPUs lets every vCPU enter the guest. Preconditions: mu is held.
func (m *VM) resumeVCPUs(ctx context.Context) error {
	var all error
	for _, c := range m.vcpus {
		all = errors.Join(all, c.resume(ctx))
	}
	return all
}

// PowerButton presses the ACPI power button. What follows is up to the guest.
func (m *VM) PowerButton() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.state != api.Running {
		return fmt.Errorf("power button: VM is %s: %w", m.state, api.ErrWrongState)
	}
	m.platform.ged.PressPowerButton()
	return nil
}

// Kill ends the guest at once. Disks are flushed, the guest is not asked. One
// that is about to go on elsewhere is ended if it does not. One that runs there
// already, and lacks pages that are here, loses them.
func (m *VM) Kill() {
	m.decidedOrGone()
	m.end(Exit{Reason: ExitKilled})
}

// Wait returns how the guest ended, after every thread and worker has been
// joined.
func (m *VM) Wait(ctx context.Context) (Exit, error) {
	select {
	case <-m.ended:
		m.mu.Lock()
		defer m.mu.Unlock()
		return m.exit, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

// Close ends the guest if it still runs and frees everything.
func (m *VM) Close() error {
	m.mu.Lock()
	state := m.state
	m.mu.Unlock()
	if state == api.Running || state == api.Paused {
		m.end(Exit{Reason: ExitKilled})
		<-m.ended
	}
	m.looks.close()
	m.throttle.set(m.vcpus, 0)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state, m.closed = api.Stopped, true
	return m.cleanup.close()
}
