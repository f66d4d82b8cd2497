package vmm

import (
	"context"
	"errors"
	"strings"
	"testing"
	"time"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
)

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

// TestMigrateInDoubt: between giving up its disks and taking them back nothing
// lets a VM run but the migration, and not even that when somebody else has
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
