package vmm

import (
	"errors"
	"fmt"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

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
				here.namedAgain(f.report)
				return
			}
			here.finish()
		})
	}
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
