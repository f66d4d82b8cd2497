package vmm

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// Destination makes VMs that come from other hosts: the [live.DestinationVM].
type Destination struct {
	Options
	// Configure makes the configuration for this host out of the offered one: the
	// same machine, with other paths and another name where that is wanted. nil
	// takes it as it is.
	Configure func(live.Offer) (config.Config, error)
}

// Prepare implements [live.DestinationVM]. What it returns is an [*Arrival].
func (d Destination) Prepare(ctx context.Context, o live.Offer) (live.Arrival, error) {
	configure := d.Configure
	if configure == nil {
		configure = func(o live.Offer) (config.Config, error) { return config.Parse(o.Config) }
	}
	cfg, err := configure(o)
	if err != nil {
		return nil, err
	}
	a, err := PrepareArrival(ctx, o, cfg, d.Options)
	if err != nil {
		return nil, err
	}
	return a, nil
}

// Arrival is a VM that comes from another host: the [live.Arrival]. All that can
// be made before the guest stands still is made first, and what this host lacks
// is found out before memory moves:
//
//	PrepareArrival   KVM, memory, vCPUs, tracker, networks; layers are opened for
//	                 reading, without locks
//	Construct        disks, with their locks and cold; state
//	Run              the guest goes on, and is announced to its networks
type Arrival struct {
	m      *VM
	opts   Options
	layers *layerReaders
	offer  []live.Layer
	made   bool           // the VM is
	paused bool           // it was, and stays so
	shared bool           // its memory is that of the process it comes from
	copies *arrivingDisks // nil for disks that are shared
}

// PrepareArrival looks whether the VM of an offer can run here as cfg says, and
// makes what does not need its disks. Everything else that needs rights is opened
// here. ctx bounds the making only.
func PrepareArrival(ctx context.Context, o live.Offer, cfg config.Config, opts Options) (*Arrival, error) {
	cpus, err := checkOffer(o, &cfg)
	if err = errors.Join(err, checkHanded(o, opts)); err != nil {
		return nil, err
	}
	a := &Arrival{m: prepare(cfg, opts), opts: opts, offer: o.Layers, paused: o.Paused, shared: o.Shared}
	a.m.saved = &savedState{
		cpu: cpus, fill: func(*VM) error { return nil }, disksLater: true,
		opts: RestoreOptions{Options: opts, AdvanceClock: true}, began: time.Now(),
	}
	if err = a.prepare(ctx, o); err != nil {
		return nil, errors.Join(err, a.Abandon())
	}
	return a, nil
}

func (a *Arrival) prepare(ctx context.Context, o live.Offer) (err error) {
	m := a.m
	if o.Storage == live.StorageCopied {
		if a.copies, err = planDisks(ctx, &o, &m.cfg); err != nil {
			return err
		}
	}
	if a.layers, err = openLayers(o, &m.cfg, a.copies, m.log); err != nil {
		return err
	}
	if err := m.build(ctx, a.opts); err != nil {
		return err
	}
	state.Warm() // the guest stands still when its state comes
	// Devices have put there what the guest will not find.
	m.mem.SetObserver(nil)
	if m.naming != nil {
		m.learned = newLearned(m.mem)
		a.layers.teach(m.learned)
	}
	return m.mem.Clear()
}

// VM is the machine. It is complete when Construct has returned.
func (a *Arrival) VM() *VM { return a.m }

// Memory implements [live.Arrival].
func (a *Arrival) Memory() *memory.Space { return a.m.mem }

// Layer implements [live.Arrival].
func (a *Arrival) Layer(n int) io.ReaderAt { return a.layers.at(n) }

// Construct implements [live.Arrival].
func (a *Arrival) Construct(ctx context.Context, sections []state.Section, missing *memory.PageSet, source memory.PageSource) error {
	m := a.m
	saved, err := decodeState(sections, &m.cfg)
	if err != nil {
		return fmt.Errorf("construct: %w", err)
	}
	if err := m.saved.arrived(saved, m.msrIndices); err != nil {
		return fmt.Errorf("construct: %w", err)
	}
	m.saved = saved
	if a.shared {
		// What was read of it so far may be old, and what was written is not the guest's.
		if err := m.mem.Clear(); err != nil {
			return fmt.Errorf("construct: %w", err)
		}
	}
	// What was read of disks so far may be old.
	if err := a.layers.drop(); err != nil {
		m.log.Warn("the page cache may hold what disks were before", "err", err)
	}
	m.mem.SetObserver(m.tracker)
	if err := a.complete(ctx, missing, source); err != nil {
		return fmt.Errorf("construct: %w", err)
	}
	a.made = true
	return nil
}

func (a *Arrival) complete(ctx context.Context, missing *memory.PageSet, source memory.PageSource) error {
	m := a.m
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if missing != nil && missing.Count() > 0 {
		if err := m.pull(missing, source); err != nil {
			return err
		}
	}
	if err := a.copies.finish(); err != nil {
		return err
	}
	if err := m.addDisksLater(); err != nil {
		return err
	}
	if err := m.applyState(m.saved); err != nil {
		return err
	}
	if m.learned != nil {
		m.learned.match(m, a.offer)
	}
	m.begin()
	return nil
}

// begin lets the threads of a VM begin that has a state, paused.
func (m *VM) begin() {
	for _, c := range m.vcpus {
		c.start()
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.started, m.state = time.Now(), api.Paused
	go m.supervise()
}

// Run implements [live.Arrival].
func (a *Arrival) Run(ctx context.Context) error {
	if !a.made {
		return errors.New("the VM that arrives is not constructed")
	}
	// The commit point has passed: the memory is this process's.
	if err := a.m.mem.Adopt(); err != nil {
		return err
	}
	if a.paused {
		return nil // its user resumes it
	}
	return a.m.Resume(ctx)
}

// Abandon implements [live.Arrival].
func (a *Arrival) Abandon() error {
	a.made = false
	return errors.Join(a.layers.close(), a.copies.abandon(a.m.disks...), a.m.Close())
}

// arrived checks that a state is of the VM that was prepared, and makes it one
// that is on its way.
func (s *savedState) arrived(now *savedState, msrs []uint32) error {
	if !slices.Equal(s.cpu.cpuid, now.cpu.cpuid) || s.cpu.tscKHz != now.cpu.tscKHz {
		return fmt.Errorf("%w: its CPU is not the one that was offered", ErrOtherMachine)
	}
	if _, err := now.prepareCPUs(now.cpu.cpuid, msrs); err != nil {
		return err
	}
	now.opts, now.began = s.opts, s.began
	return nil
}

// pull lets pages come later, from where the VM was.
func (m *VM) pull(missing *memory.PageSet, source memory.PageSource) error {
	for run := range missing.Runs() {
		if err := m.mem.Discard(run.Start, run.Size); err != nil {
			return err
		}
	}
	pulled, err := m.mem.OpenMissing(source, missing, memory.MissingOptions{
		TrackWrites: m.tracker.Kind() == memory.TrackerWPAsync,
		Failed:      m.memoryFailed,
	})
	if err != nil {
		return err
	}
	m.cleanup.add(pulled.Close)
	m.pulled = pulled
	return nil
}

// pullRest fetches what nobody has asked for yet.
func (m *VM) pullRest(ctx context.Context) {
	if m.pulled.Done() {
		return
	}
	if err := m.pulled.Run(ctx, 0); err != nil && ctx.Err() == nil {
		m.log.Warn("a part of guest memory cannot be had; the guest ends when it needs it", "err", err, "bytes", m.pulled.Stats().Waiting)
	}
}
