package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
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

// TestMigrate: with every tracker, with names and without, what arrives is what
// left, disks included, and goes on.
func TestMigrate(t *testing.T) {
	for _, v := range []struct {
		tracker memory.TrackerKind
		names   bool
		o       live.Options
	}{
		{memory.TrackerWPAsync, true, live.Options{Connections: 2, Verify: true}},
		{memory.TrackerWPAsync, false, live.Options{Verify: true}},
		{memory.TrackerKVMLog, true, live.Options{Connections: 1, Verify: true, Compression: live.Zstd}},
		{memory.TrackerKVMLog, false, live.Options{Verify: true}},
		{memory.TrackerKVMRing, true, live.Options{Verify: true, NoNames: true}},
		{memory.TrackerNone, true, live.Options{Verify: true, Connections: 1}},
	} {
		t.Run(fmt.Sprintf("%s,names=%t", v.tracker, v.names), func(t *testing.T) {
			r := newSaveRig(t, saveSpec, func(c *config.Config) {
				c.Memory.Names, c.Memory.Tracker = config.OnOff(v.names), v.tracker
			})
			r.readAll()
			stop := r.traffic(5)
			o := v.o
			l := newLanding(t)
			var differ []memory.GFN
			l.after = func(step string) {
				if step == "construct" {
					differ = differing(t, r.m.mem, l.vm.mem)
				}
			}
			await(t, deadline(t), "blocks and buffers are overwritten", func() bool { return r.overwritten.Load() > 500 })
			f := fly(t, r.m.MigrationSource(), l, o)
			if f.err != nil || f.arrived != nil {
				t.Fatalf("source: %v; destination: %v", f.err, f.arrived)
			}
			stop()
			defer l.vm.Close()
			if len(differ) > 0 {
				t.Errorf("%d pages differ while both stand still, the first %s", len(differ), differ[0])
			}
			if exit, err := r.m.Wait(deadline(t)); err != nil || exit.Reason != ExitMigrated {
				t.Errorf("the source ended as %+v, %v", exit, err)
			}
			t.Logf("%+v", f.report)
			if named := f.report.Pages.Named > 0; named != (v.names && !o.NoNames) {
				t.Errorf("%d pages were named", f.report.Pages.Named)
			}
			if (f.report.Mode == "stop") != (v.tracker == memory.TrackerNone) {
				t.Errorf("its mode was %s", f.report.Mode)
			}
			here := &saveRig{t: t, m: l.vm, c: l.vm.cfg, content: r.content, dir: r.dir}
			got := make([]byte, namesDisk)
			if err := l.vm.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || string(got) != string(r.content) {
				t.Errorf("the disk is not what it was, %v", err)
			}
			here.runs()
			if v.names && !o.NoNames {
				here.namedAgain(f.report.Pages.Named)
				return
			}
			here.finish()
		})
	}
}

// namedAgain migrates a machine that has arrived by names: they came with it, since
// its guest has read nothing.
func (r *saveRig) namedAgain(named uint64) {
	r.t.Helper()
	await(r.t, deadline(r.t), "names are taught", func() bool { return r.m.naming.Stats().Named > 0 })
	m, report := migrated(r.t, r.m, live.Options{Connections: 1, Verify: true})
	if report.Pages.Named < named/2 {
		r.t.Errorf("%d pages were named, and %d when it came", report.Pages.Named, named)
	}
	(&saveRig{t: r.t, m: m}).finish()
}

// TestMigrateBackAndForth: a guest that checks its memory is moved again and again
// and never finds a page that it did not write; its clocks do not drift, disks
// change hands, and nothing is left behind.
func TestMigrateBackAndForth(t *testing.T) {
	c := fullConfig(t, "memwriter:size=8M,words=16,order=random,seed=5")
	c.CPUs = 2
	c.Memory.Size = 32 << 20
	top := filepath.Join(t.TempDir(), "top.qcow2")
	if err := chain.CreateOverlay(top, c.Disks[0].Path, chain.Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	c.Disks = append(c.Disks, config.Disk{Path: top, Format: chain.Qcow2})
	c.Disks[0].ReadOnly = true
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	began, first := time.Now(), guestTime(t, m)
	rounds := labtest.Count(6, 500)
	var fds, goroutines, mapped int
	var downtime, worst, drift time.Duration
	var sent uint64
	for i := range rounds {
		if i == 1 { // whatever the runtime keeps for good
			fds, goroutines, mapped = countFDs(t), runtime.NumGoroutine(), mappings(t)
		}
		from := m
		var report live.Report
		m, report = migrated(t, m, live.Options{Connections: i % 3, NoNames: i%5 == 4, Verify: i%10 == 0, NoThrottle: true})
		if err := from.Close(); err != nil {
			t.Fatal(err)
		}
		downtime, worst, sent = downtime+report.Downtime, max(worst, report.Downtime), sent+report.Sent.Total
		runUntil(t, m, 200)
		drift = max(drift, (guestTime(t, m) - first - time.Since(began)).Abs())
		for _, d := range m.disks {
			if _, err := chain.Open(d.image.Path(), chain.Options{Format: d.image.Layers()[0].Format()}); !errors.Is(err, disk.ErrLocked) {
				t.Fatalf("migration %d: disk %s is not locked: %v", i, d.image.Path(), err)
			}
		}
	}
	if drift > 10*time.Millisecond {
		t.Errorf("the guest's clocks have drifted by %s in %d migrations", drift, rounds)
	}
	// Each test context and clean-up of a machine stays until the test's end, and
	// none of them is a descriptor or a goroutine.
	if got := countFDs(t); got > fds {
		t.Errorf("%d descriptors after %d migrations, %d after the first", got, rounds, fds)
	}
	await(t, deadline(t), "goroutines end", func() bool { return runtime.NumGoroutine() <= goroutines })
	if got := mappings(t); got > mapped+rounds+50 {
		t.Errorf("%d mappings after %d migrations, %d after the first", got, rounds, mapped)
	}
	if err := payload.CommandMemWriter(m.mem, payload.CommandFinish); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(deadline(t))
	if err != nil || exit.Reason != ExitStatus || exit.Status != 0 {
		t.Fatalf("exit %+v, %v, want status 0", exit, err)
	}
	end, err := payload.ReadMemWriter(m.mem)
	if err != nil || end.Errors != 0 || end.Checks != 1 {
		t.Errorf("status %+v, %v", end, err)
	}
	if !t.Failed() {
		labtest.Proof(t, "migrate-native", "%d migrations of a guest that checks its memory, back and forth: %d pages written, none wrong; clocks within %s, downtime %s on average and %s at most, no descriptor, goroutine or mapping left",
			rounds, end.Writes, drift.Round(10*time.Microsecond), (downtime / time.Duration(rounds)).Round(10*time.Microsecond), worst.Round(10*time.Microsecond))
	}
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

// TestMigrateFails: whichever step fails before the commit, the guest goes on
// where it was, with its disks, and another attempt succeeds.
func TestMigrateFails(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	broken := errors.New("broken on purpose")
	fail := func(at string) func(string) error {
		return func(step string) error {
			if step == at {
				return broken
			}
			return nil
		}
	}
	for _, at := range []string{"begin", "names", "collect", "pause", "state", "release"} {
		l := newLanding(t)
		f := fly(t, &failing{r.m.MigrationSource(), fail(at)}, l, live.Options{Connections: 1})
		if !errors.Is(f.err, broken) || f.report.Outcome != live.OutcomeNever || l.vm != nil {
			t.Errorf("source, %s: %v, %v", at, f.err, f.report.Outcome)
		}
		r.stays(at)
	}
	for _, at := range []string{"prepare", "construct"} {
		l := newLanding(t)
		l.before = fail(at)
		f := fly(t, r.m.MigrationSource(), l, live.Options{Connections: 1})
		if !errors.Is(f.arrived, broken) || f.err == nil || !strings.Contains(f.err.Error(), broken.Error()) || f.report.Outcome != live.OutcomeNever {
			t.Errorf("destination, %s: %v, %v", at, f.err, f.arrived)
		}
		r.stays(at)
	}
	m, _ := migrated(t, r.m, live.Options{Connections: 1})
	(&saveRig{t: t, m: m}).finish()
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

// TestMigrateInDoubt: between giving up its disks and taking them back nothing
// lets a VM run but the migration, and not even that when somebody else has

// TestMigrateKilledAfterCommit: until it is decided where the guest runs, a kill
// waits; afterwards it does not, even if memory is still needed.
func TestMigrateKilledAfterCommit(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	ctx := deadline(t)
	s := r.m.MigrationSource()
	_, err := s.Offer(ctx)
	for _, step := range []func(context.Context) error{s.Begin, s.Pause, s.ReleaseDisks} {
		if err == nil {
			err = step(ctx)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	killed := make(chan struct{})
	go func() {
		defer close(killed)
		r.m.Kill()
	}()
	select {
	case <-killed:
		t.Fatal("killed while it was not decided")
	case <-time.After(50 * time.Millisecond):
	}
	ended := s.Committed()
	for _, done := range []<-chan struct{}{killed, ended} {
		select {
		case <-done:
		case <-ctx.Done():
			t.Fatal("a kill waits for memory that nobody may fetch any more")
		}
	}
	if err := s.End(); err != nil {
		t.Error(err)
	}
	if e, err := r.m.Wait(ctx); err != nil || e.Reason != ExitKilled {
		t.Errorf("%+v, %v", e, err)
	}
}

// written them.
func TestMigrateInDoubt(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	ctx := deadline(t)
	s := r.m.MigrationSource()
	if _, err := s.Offer(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.Begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.m.MigrationSource().Begin(ctx); err == nil {
		t.Error("two migrations at once")
	}
	if _, err := r.m.Save(ctx, r.local("snap", ""), SaveOptions{}); err == nil {
		t.Error("a save during a migration")
	}
	if err := s.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	if err := r.m.Resume(ctx); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("resumed by hand while it stands still: %v", err)
	}
	if _, err := r.m.Memory(ctx, api.MemoryQuery{Pause: true}); err == nil {
		t.Error("a look that pauses may resume it")
	}
	if err := s.ReleaseDisks(ctx); err != nil {
		t.Fatal(err)
	}
	other, err := chain.Open(r.c.Disks[0].Path, chain.Options{})
	if err != nil {
		t.Fatalf("the disk was not given up: %v", err)
	}
	if err := s.ReclaimDisks(ctx); !errors.Is(err, disk.ErrLocked) {
		t.Errorf("taken back while another has it: %v", err)
	}
	if err := s.End(); err != nil {
		t.Fatal(err)
	}
	for what, do := range map[string]func() error{
		"resume":  func() error { return r.m.Resume(ctx) },
		"source":  func() error { return s.Resume(ctx) },
		"resize":  func() error { return r.m.ResizeDisk(0, namesDisk/2) },
		"migrate": func() error { return r.m.MigrationSource().Begin(ctx) },
		"save": func() error {
			_, err := r.m.Save(ctx, r.local("snap", ""), SaveOptions{})
			return err
		},
	} {
		if err := do(); !errors.Is(err, api.ErrWrongState) || !strings.Contains(err.Error(), "--take-back") {
			t.Errorf("%s without disks: %v", what, err)
		}
	}
	if err := other.Close(); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(s.ReclaimDisks(ctx), s.Resume(ctx)); err != nil {
		t.Fatalf("taken back: %v", err)
	}
	r.stays("in doubt")

	again := r.m.MigrationSource()
	if _, err := again.Offer(ctx); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(again.Begin(ctx), again.Pause(ctx), again.ReleaseDisks(ctx), again.End()); err != nil {
		t.Fatal(err)
	}
	other, err = chain.Open(r.c.Disks[0].Path, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(other.WriteAtv([][]byte{make([]byte, 4096)}, 0), other.Close()); err != nil {
		t.Fatal(err)
	}
	if err := again.ReclaimDisks(ctx); !errors.Is(err, disk.ErrWritten) {
		t.Errorf("taken back after another has written: %v", err)
	}
	r.m.Kill()
	if exit, err := r.m.Wait(ctx); err != nil || exit.Reason != ExitKilled {
		t.Errorf("a VM in doubt cannot be stopped: %+v, %v", exit, err)
	}
}

// TestDue: a guest that was told late naps longer, and not for ever.
func TestDue(t *testing.T) {
	for _, percent := range []int{1, 20, 50, 90, 99} {
		run, nap := slice(percent)
		if whole := run + nap; whole < shortSlice || whole > longSlice || nap*100 != whole*time.Duration(percent) {
			t.Errorf("%d %%: %s of %s", percent, nap, whole)
		}
		for ran, want := range map[time.Duration]time.Duration{
			run / 2: nap, run: nap, 2 * run: min(2*nap, longNap), time.Hour: longNap,
		} {
			if got := due(ran, run, nap); got != want {
				t.Errorf("%d %%: a nap of %s after %s, want %s", percent, got, ran, want)
			}
		}
	}
}

// TestThrottle: the guest executes less, and pause, stop and commands do not wait.
func TestThrottle(t *testing.T) {
	c := payloadConfig("memwriter:size=4M,words=8,order=random,seed=1")
	c.CPUs = 2
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	writes := func() uint64 {
		before, began := mustStatus(t, m).Writes, time.Now()
		time.Sleep(200 * time.Millisecond)
		return uint64(float64(mustStatus(t, m).Writes-before) / time.Since(began).Seconds())
	}
	source := m.MigrationSource()
	for _, tc := range []struct {
		percent int
		most    float64 // of what it does else
	}{{50, 0.8}, {90, 0.4}, {99, 0.2}} {
		// Whatever else the host does, both are measured in turn until that shows.
		got := 0.0
		for agree := 0; agree < 3; agree++ {
			source.Throttle(0)
			full := writes()
			source.Throttle(tc.percent)
			if got = float64(writes()) / float64(full+1); got > tc.most {
				agree = -1
			}
			if ctx.Err() != nil {
				t.Fatalf("a guest that is throttled by %d %% does %.2f of what it did", tc.percent, got)
			}
		}
		t.Logf("throttled by %d %% it does %.3f of what it did", tc.percent, got)
	}
	for range 20 {
		if err := errors.Join(m.Pause(ctx), m.Resume(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	source.Throttle(0)
	runUntil(t, m, 1000)
	source.Throttle(99)
	// It is closed while it naps.
}

// TestMigratePaused: a VM that is paused arrives paused, and goes on when it is
// resumed; one that is resumed meanwhile stays.
func TestMigratePaused(t *testing.T) {
	m := newVM(t, payloadConfig("memwriter:size=4M,words=8,order=random,seed=1"), newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	f := fly(t, &failing{m.MigrationSource(), func(step string) error {
		if step == "pause" {
			return m.Resume(ctx)
		}
		return nil
	}}, newLanding(t), live.Options{})
	if !errors.Is(f.err, api.ErrWrongState) || m.Info().State != api.Running {
		t.Errorf("resumed meanwhile: %v; the VM is %s", f.err, m.Info().State)
	}
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	before := mustStatus(t, m).Writes
	there, _ := migrated(t, m, live.Options{})
	if state := there.Info().State; state != api.Paused {
		t.Fatalf("it arrived %s", state)
	}
	if now := mustStatus(t, there).Writes; now != before {
		t.Errorf("%d writes after %d", now, before)
	}
	if err := there.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, there, 1000)
	finishWriter(t, there)
}

// TestArrivalRefused: what this host lacks is said before memory moves, in words
// that tell what to do, and nothing is left.
func TestArrivalRefused(t *testing.T) {
	c := fullConfig(t, "memwriter:size=2M")
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	offer, err := m.MigrationSource().Offer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	other := filepath.Join(t.TempDir(), "other.img")
	if err := os.WriteFile(other, make([]byte, 2<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name   string
		change func(o *live.Offer, c *config.Config)
		says   string
	}{
		{"another CPU", func(o *live.Offer, _ *config.Config) {
			o.CPU = offeredCPU(t, o, func(x *state.CPU) {
				for _, l := range x.Cpuid {
					if l.Function == 0x7 && l.Index == 0 {
						l.Ecx |= 1<<3 | 1<<4 // pku, and what goes with it
						l.Ebx |= 1 << 28     // avx512cd
						l.Edx |= 1 << 2
					}
				}
			})
		}, "this host's CPU lacks what the guest uses: "},
		{"another vendor", func(o *live.Offer, _ *config.Config) {
			o.CPU = offeredCPU(t, o, func(x *state.CPU) {
				for _, l := range x.Cpuid {
					if l.Function == 0 {
						l.Ebx, l.Edx, l.Ecx = 0x68747541, 0x69746e65, 0x444d4164
						if host := cpuVendor(m.cpuid); host == "DMAc" || host == "AuthenticAMD" {
							l.Ebx, l.Edx, l.Ecx = 0x756e6547, 0x49656e69, 0x6c65746e
						}
					}
				}
			})
		}, "this host's is of"},
		{"no CPU", func(o *live.Offer, _ *config.Config) { o.CPU = state.Section{} }, "where its CPU should be"},
		{"more vCPUs", func(_ *live.Offer, c *config.Config) { c.CPUs = 2 }, "1 vCPUs, and this one 2"},
		{"less memory", func(_ *live.Offer, c *config.Config) { c.Memory.Size /= 2 }, "bytes of memory"},
		{"more memory than there is", func(o *live.Offer, c *config.Config) {
			c.Memory.Size = 1 << 39
			o.RAM, _ = memory.Layout(1 << 39)
			o.Config = []byte(strings.Replace(string(o.Config), `"size":"16M"`, `"size":"512G"`, 1))
		}, "are available here"},
		{"no rng", func(_ *live.Offer, c *config.Config) { c.RNG = false }, `"rng0"`},
		{"no disk", func(_ *live.Offer, c *config.Config) { c.Disks[0].Path += ".gone" }, "does not exist"},
		{"another disk", func(_ *live.Offer, c *config.Config) { c.Disks[0].Path = other }, "share it, or have it copied"},
		{"a tap that cannot be", func(o *live.Offer, c *config.Config) {
			c.Nets = []config.Net{{Mode: config.NetTap, Tap: "ditto-test", Bridge: "no-such-br", MAC: "02:00:00:00:00:01"}}
			text, err := json.Marshal(c)
			if err != nil {
				t.Fatal(err)
			}
			o.Config = text
		}, "net 0 (tap)"},
		{"nonsense", func(o *live.Offer, _ *config.Config) { o.Config = []byte("{") }, "the offered VM"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			o, cfg := offer, c
			cfg.Disks = slices.Clone(c.Disks)
			tc.change(&o, &cfg)
			before := countFDs(t)
			a, err := PrepareArrival(t.Context(), o, cfg, Options{Console: newConsole()})
			if err == nil {
				_ = a.Abandon()
			}
			if err == nil || !strings.Contains(err.Error(), tc.says) {
				t.Errorf("%v, want %q", err, tc.says)
			}
			if strings.Contains(fmt.Sprint(err), "\n") {
				t.Errorf("more than one line: %v", err)
			}
			// Fewer are of machines of other tests, whose rings end late.
			if now := countFDs(t); now > before {
				t.Errorf("%d descriptors, %d before", now, before)
			}
			t.Log(err)
		})
	}
}

// offeredCPU changes what an offer says of CPUs.
func offeredCPU(t *testing.T, o *live.Offer, change func(*state.CPU)) state.Section {
	t.Helper()
	var x state.CPU
	if err := state.Decode(o.CPU, &x); err != nil {
		t.Fatal(err)
	}
	change(&x)
	s, err := state.Encode("cpu", &x)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestRoomFor: memory is what the host and every control group have left.
func TestRoomFor(t *testing.T) {
	root := t.TempDir()
	for path, text := range map[string]string{
		"proc/meminfo":                        "MemTotal:  9000 kB\nMemAvailable:    4096 kB\nSwapFree:  4096 kB\n",
		"proc/self/cgroup":                    "0::/a/b\n",
		"sys/fs/cgroup/a/memory.max":          "7340032\n",
		"sys/fs/cgroup/a/memory.current":      "1048576\n",
		"sys/fs/cgroup/a/b/memory.max":        "max\n",
		"sys/fs/cgroup/a/b/memory.current":    "4096\n",
		"sys/fs/cgroup/other/memory.max":      "1\n",
		"sys/fs/cgroup/other/memory.current":  "1\n",
		"sys/fs/cgroup/memory.current-is-not": "here",
	} {
		at := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(at), 0o700), os.WriteFile(at, []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := availableMemory(root); err != nil || got != 6<<20 {
		t.Errorf("%d bytes, %v; want 6 MiB", got, err)
	}
	for size, fits := range map[config.Bytes]bool{6 << 20: true, 7 << 20: false} {
		if err := roomFor(&config.Memory{Size: size}, root); (err == nil) != fits || err != nil && !errors.Is(err, ErrNoMemory) {
			t.Errorf("%d bytes: %v", size, err)
		}
	}
	if err := roomFor(&config.Memory{Size: 7 << 20, HugePages: memory.HugePages2M}, root); err != nil {
		t.Errorf("a pool of its own: %v", err)
	}
	if err := roomFor(&config.Memory{Size: 1 << 40}, t.TempDir()); err != nil {
		t.Errorf("a host that does not say: %v", err)
	}
}

// TestMigrateForgetful: without what was written since it was sent, memory is
// another one, which is noticed where it is asked for, and the guest stays.
func TestMigrateForgetful(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	f := fly(t, &forgetful{r.m.MigrationSource()}, newLanding(t), live.Options{Verify: true, Downtime: time.Hour, Connections: 1})
	if f.err == nil || !strings.Contains(f.err.Error(), "memory differs") {
		t.Errorf("memory without the pages that were written last: %v", f.err)
	}
	r.stays("forgetful")
	r.finish()
}

// forgetful does not tell what was written.
type forgetful struct{ live.SourceVM }

func (f *forgetful) Collect(*memory.PageSet) error { return nil }

// TestMigrateRestored: a VM whose memory is still in the snapshot that it came
// from takes it along.
func TestMigrateRestored(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.Zstd)
	m := restoreFrom(t, dir, SnapshotOptions{Mode: RestoreLazy, Config: c})
	l := newLanding(t)
	same := false
	l.after = func(step string) {
		if step == "construct" {
			same = digestMemory(t, l.vm) == digestMemory(t, m)
		}
	}
	if digestMemory(t, m) != was {
		t.Fatal("memory was restored wrong")
	}
	again := restoreFrom(t, dir, SnapshotOptions{Mode: RestoreLazy, Config: c})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = again
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	f := fly(t, m.MigrationSource(), l, live.Options{Connections: 1, Verify: true})
	if f.err != nil || f.arrived != nil {
		t.Fatalf("source: %v; destination: %v", f.err, f.arrived)
	}
	defer l.vm.Close()
	if !same {
		t.Error("memory differs while both stand still")
	}
	finishWriter(t, l.vm)
}

// TestMigrateStopped: a VM that is stopped in the moment in which it stands still
// is ended where it runs then.
func TestMigrateStopped(t *testing.T) {
	for _, fails := range []bool{false, true} {
		m := newVM(t, payloadConfig("memwriter:size=4M"), newConsole())
		ctx := deadline(t)
		if err := m.Start(ctx); err != nil {
			t.Fatal(err)
		}
		runUntil(t, m, 100)
		killed := make(chan struct{})
		l := newLanding(t)
		l.before = func(step string) error {
			if step != "construct" {
				return nil
			}
			go func() {
				defer close(killed)
				if err := m.Stop(ctx, time.Minute); err != nil {
					t.Error(err)
				}
			}()
			if fails {
				return errors.New("broken on purpose")
			}
			return nil
		}
		f := fly(t, m.MigrationSource(), l, live.Options{})
		<-killed
		exit, err := m.Wait(ctx)
		if err != nil || fails && (exit.Reason != ExitKilled || f.err == nil) || !fails && f.err != nil {
			t.Errorf("it ended as %+v, %v; the migration %v", exit, err, f.err)
		}
		if fails {
			continue
		}
		if state := l.vm.Info().State; state != api.Running {
			t.Errorf("it is %s where it went", state)
		}
		if err := l.vm.Close(); err != nil {
			t.Error(err)
		}
	}
}
