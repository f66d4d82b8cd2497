package vmm

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
)

// landing is the destination of tests: it can look at what arrives before the
// guest runs.
type landing struct {
	Destination
	vm *VM
	// before is called with the name of each step that is about to be done, and
	// may let it fail.
	before func(step string) error
	after  func(step string)
}

func newLanding(t testing.TB) *landing {
	return &landing{Destination: Destination{Options: Options{
		Console: newConsole(), Log: slog.New(slog.NewTextHandler(t.Output(), nil)), Version: "test",
	}}}
}

func (l *landing) step(name string, do func() error) error {
	if l.before != nil {
		if err := l.before(name); err != nil {
			return err
		}
	}
	err := do()
	if err == nil && l.after != nil {
		l.after(name)
	}
	return err
}

// Prepare implements [live.DestinationVM].
func (l *landing) Prepare(ctx context.Context, o live.Offer) (live.Arrival, error) {
	var a live.Arrival
	err := l.step("prepare", func() (err error) {
		a, err = l.Destination.Prepare(ctx, o)
		return err
	})
	if err != nil {
		if a != nil {
			err = errors.Join(err, a.Abandon())
		}
		return nil, err
	}
	l.vm = a.(*Arrival).VM()
	return &landed{a, l}, nil
}

type landed struct {
	live.Arrival
	l *landing
}

func (a *landed) Construct(ctx context.Context, sections []state.Section, missing *memory.PageSet, source memory.PageSource) error {
	return a.l.step("construct", func() error { return a.Arrival.Construct(ctx, sections, missing, source) })
}

func (a *landed) Run(ctx context.Context) error {
	return a.l.step("run", func() error { return a.Arrival.Run(ctx) })
}

func (a *landed) Abandon() error {
	a.l.vm = nil
	return a.Arrival.Abandon()
}

// failing is a source of which each step can fail.
type failing struct {
	live.SourceVM
	before func(step string) error
}

func (f *failing) Begin(ctx context.Context) error {
	if err := f.before("begin"); err != nil {
		return err
	}
	return f.SourceVM.Begin(ctx)
}

func (f *failing) Names(ctx context.Context, progress func(done, total uint64)) (live.Recorded, error) {
	if err := f.before("names"); err != nil {
		return nil, err
	}
	return f.SourceVM.Names(ctx, progress)
}

func (f *failing) Collect(into *memory.PageSet) error {
	return errors.Join(f.before("collect"), f.SourceVM.Collect(into))
}

func (f *failing) Pause(ctx context.Context) error {
	if err := f.before("pause"); err != nil {
		return err
	}
	return f.SourceVM.Pause(ctx)
}

func (f *failing) State(ctx context.Context) ([]state.Section, error) {
	if err := f.before("state"); err != nil {
		return nil, err
	}
	return f.SourceVM.State(ctx)
}

func (f *failing) ReleaseDisks(ctx context.Context) error {
	return errors.Join(f.SourceVM.ReleaseDisks(ctx), f.before("release"))
}

// flight is one migration.
type flight struct {
	report  live.Report
	err     error
	result  live.Result
	arrived error
}

// fly migrates a VM over sockets.
func fly(t testing.TB, from live.SourceVM, to live.DestinationVM, o live.Options) (f flight) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	o.Log, o.Trusted, o.Where = log, true, "the other side"
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	wg.Go(func() {
		f.result, f.arrived = live.Receive(ctx, to, live.AcceptFrom(l), live.ReceiveOptions{Ditto: "test", Log: log, Stall: o.Stall})
	})
	f.report, f.err = live.Send(ctx, from, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", l.Addr().String())
	}, o)
	if f.err != nil && f.report.Outcome != live.OutcomeCommitted {
		cancel() // a receiver that nobody came to
	}
	wg.Wait()
	return f
}

// migrated moves a machine, which ends, and returns what it is now. The test closes
// it.
func migrated(t testing.TB, m *VM, o live.Options) (*VM, live.Report) {
	t.Helper()
	l := newLanding(t)
	f := fly(t, m.MigrationSource(), l, o)
	if f.err != nil || f.arrived != nil {
		t.Fatalf("source: %v; destination: %v", f.err, f.arrived)
	}
	if exit, err := m.Wait(deadline(t)); err != nil || exit.Reason != ExitMigrated {
		t.Errorf("the source ended as %+v, %v", exit, err)
	}
	t.Cleanup(func() {
		if err := l.vm.Close(); err != nil {
			t.Error(err)
		}
	})
	return l.vm, f.report
}

// namedAgain migrates a machine that has arrived by names: they came with it, since
// its guest has read nothing. Names that did not hold, since blocks and buffers
// were overwritten meanwhile, were asked for as bytes and have taught none.
func (r *saveRig) namedAgain(came live.Report) {
	r.t.Helper()
	named := came.Pages.Named - min(came.Pages.Asked, came.Pages.Named)
	await(r.t, deadline(r.t), "names are taught", func() bool { return r.m.naming.Stats().Named > 0 })
	m, report := migrated(r.t, r.m, live.Options{Connections: 1, Verify: true})
	if report.Pages.Named < named/2 {
		r.t.Errorf("%d pages were named, and %d when it came", report.Pages.Named, named)
	}
	(&saveRig{t: r.t, m: m}).finish()
}

// guestTime is the guest's kvmclock.
func guestTime(t testing.TB, m *VM) time.Duration {
	t.Helper()
	c, err := m.kvm.Clock()
	if err != nil {
		t.Fatal(err)
	}
	return time.Duration(c.Clock)
}

// stays makes sure that a machine runs here as if nothing had been, and that its
// disk is its own.
func (r *saveRig) stays(what string) {
	r.t.Helper()
	r.checkRuns()
	r.write(7, 9, 1)
	r.read(7, 11, 1)
	if r.m.away || r.m.standing != nil || r.m.leaving || r.m.throttle.percent != 0 {
		r.t.Fatalf("%s: away %t, standing %v, leaving %t, throttled by %d", what, r.m.away, r.m.standing, r.m.leaving, r.m.throttle.percent)
	}
	if _, err := chain.Open(r.c.Disks[0].Path, chain.Options{}); !errors.Is(err, disk.ErrLocked) {
		r.t.Fatalf("%s: the disk is not locked: %v", what, err)
	}
}

// forgetful does not tell what was written.
type forgetful struct{ live.SourceVM }

func (f *forgetful) Collect(*memory.PageSet) error { return nil }
