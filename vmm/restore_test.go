package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"testing"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

// TestRestoreSnapshot: in every mode memory is what it was, the guest goes on and
// finds all that it wrote, and the snapshot is not changed by that.
func TestRestoreSnapshot(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, was := savedWriter(t, c, compression)
		files := digestFiles(t, dir)
		for _, mode := range []RestoreMode{RestoreLazy, RestoreEager, RestorePrefetch} {
			for _, tracker := range []memory.TrackerKind{memory.TrackerAuto, memory.TrackerKVMLog, memory.TrackerNone} {
				t.Run(fmt.Sprintf("%s/%s/%s", compression, mode, tracker), func(t *testing.T) {
					c := c
					c.Memory.Tracker = tracker
					o := SnapshotOptions{Mode: mode, Config: c}
					m := restoreFrom(t, dir, o)
					if now := digestMemory(t, m); now != was {
						t.Error("memory is another")
					}
					if err := m.Close(); err != nil {
						t.Fatal(err)
					}

					// Again, and nobody looks before the guest does.
					m = restoreFrom(t, dir, o)
					stats := m.restored.stats()
					if err := m.Resume(deadline(t)); err != nil {
						t.Fatal(err)
					}
					runUntil(t, m, 3000)
					finishWriter(t, m)
					after := m.restored.stats()
					lazy := mode != RestoreEager
					if lazy && (stats.MissingBytes == 0 || after.CopiedBytes == 0) || lazy && compression == snapshot.None && stats.MappedBytes == 0 || !lazy && stats.CopiedBytes == 0 {
						t.Errorf("before %+v, after %+v", stats, after)
					}
					if digestFiles(t, dir) != files {
						t.Error("the snapshot was changed")
					}
				})
			}
		}
	}
}

// TestRestoreIsComplete: in the end nothing depends on the snapshot but what is
// mapped, and memory that is private is large again.
func TestRestoreIsComplete(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.Zstd)
	m := restoreFrom(t, dir, SnapshotOptions{Config: c})
	ctx := deadline(t)
	if err := payload.CommandMemWriter(m.mem, payload.CommandPause); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "all is fetched", m.restored.done.Load)
	if s := m.restored.stats(); s.MissingBytes != 0 {
		t.Errorf("%+v", s)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if m.keeper != nil {
		await(t, ctx, "frames are large again", func() bool { return m.frames.Census().Large() > 0 })
	}
	if err := errors.Join(m.Pause(ctx), payload.CommandMemWriter(m.mem, payload.CommandRun)); err != nil {
		t.Fatal(err)
	}
	// The guest has written its status page, which says since when.
	if now := digestMemory(t, m); now == was {
		t.Error("the guest did not run")
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	finishWriter(t, m)
}

// TestRestoreRestarts: a guest that restarts gets empty memory, whatever was
// mapped or missing.
func TestRestoreRestarts(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, _ := savedWriter(t, c, compression)
		set, err := snapshot.CreateWorkingSet(dir)
		if err != nil || set == nil {
			t.Fatal(set, err)
		}
		m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
		ctx := deadline(t)
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		runUntil(t, m, 100)
		m.request(requestReset)
		await(t, ctx, "restart", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.resets > 0 })
		if s := m.restored.stats(); s.MissingBytes != 0 || !m.restored.done.Load() {
			t.Errorf("after the restart %+v", s)
		}
		if again, err := snapshot.CreateWorkingSet(dir); err != nil || again != nil {
			t.Errorf("what was touched before the restart is not recorded, %v", err)
		}
		usage, err := m.mem.HostUsage()
		if err != nil || usage.VMAs > 4 {
			t.Errorf("%d mappings after the restart, %v", usage.VMAs, err)
		}
		runUntil(t, m, 6000)
		finishWriter(t, m)
	}
}

// TestRestoreTracks: after a restore no write escapes the tracker, whether to
// pages that are mapped, missing or new.
func TestRestoreTracks(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.None)
	for _, kind := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog} {
		c.Memory.Tracker = kind
		m := restoreFrom(t, dir, SnapshotOptions{Config: c})
		mirror, err := trackertest.NewMirror(m.mem, m.tracker)
		if err != nil {
			t.Fatal(err)
		}
		ctx := deadline(t)
		for range 5 {
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 500)
			if err := m.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			written, err := mirror.Round(memory.Rearm)
			if err != nil {
				t.Fatal(err)
			}
			if n := written.Count(); n == 0 || n > 12000 {
				t.Errorf("%s: %d pages were written", kind, n)
			}
			if err := mirror.Check(); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestoreGivesBack: pages of a restored guest that it gives back are zeros,
// whatever they were; the others are what they were.
func TestRestoreGivesBack(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, _ := savedWriter(t, c, compression)
		files := digestFiles(t, dir)
		m := restoreFrom(t, dir, SnapshotOptions{Config: c})
		twin := restoreFrom(t, dir, SnapshotOptions{Config: c, Mode: RestoreEager})
		const from, to = memory.GPA(4 << 20), memory.GPA(52 << 20)
		for gpa, n := from, uint64(1); gpa+memory.GPA(n*memory.PageSize) < to; gpa, n = gpa+memory.GPA(3*n*memory.PageSize), n%700+1 {
			if err := errors.Join(m.mem.Discard(gpa, n*memory.PageSize), twin.mem.Discard(gpa, n*memory.PageSize)); err != nil {
				t.Fatal(err)
			}
			if n%5 == 0 {
				if err := errors.Join(m.mem.WriteAt([]byte("new"), gpa), twin.mem.WriteAt([]byte("new"), gpa)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for gpa := from; gpa < to; gpa += memory.LargeFrameSize {
			a, err1 := m.mem.View(gpa, memory.LargeFrameSize)
			b, err2 := twin.mem.View(gpa, memory.LargeFrameSize)
			if err := errors.Join(err1, err2); err != nil || !bytes.Equal(a, b) {
				t.Errorf("%s: frame %s differs, %v", compression, gpa, err)
			}
		}
		if digestFiles(t, dir) != files {
			t.Error("the snapshot was changed")
		}
	}
}

// TestRestoreShared: memory that cannot be mapped from files is read at once, and
// that is announced.
func TestRestoreShared(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.None)
	c.Memory.Backing, c.Memory.Tracker = memory.Memfd, memory.TrackerNone
	var log bytes.Buffer
	o := SnapshotOptions{Config: c}
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	m := restoreFrom(t, dir, o)
	if digestMemory(t, m) != was {
		t.Error("memory is another")
	}
	if n := strings.Count(log.String(), "before the guest runs"); n != 1 {
		t.Errorf("announced %d times: %s", n, &log)
	}
	if s := m.restored.stats(); s.MappedBytes != 0 || s.CopiedBytes == 0 || s.MissingBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// TestRestoreReads: what nobody can fetch at a fault is read before.
func TestRestoreReads(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.Zstd)
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	space := func() *memory.Space {
		m, err := memory.New(memory.Config{Size: s.Manifest().Memory.Size})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	want, got := space(), space()
	if err := s.Load(t.Context(), want, snapshot.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	r := &restored{mem: got, pages: s.Pages()}
	defer r.pages.Close()
	var all []memory.Range
	for _, region := range got.Regions() {
		all = append(all, region.Range)
	}
	if err := r.read(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	a, _ := want.View(0, want.Size())
	b, _ := got.View(0, got.Size())
	if !bytes.Equal(a, b) {
		t.Error("memory differs")
	}
}

func TestRestoreModeText(t *testing.T) {
	for m := RestoreLazy; m <= RestorePrefetch; m++ {
		text, err := m.MarshalText()
		var back RestoreMode
		if err != nil || back.UnmarshalText(text) != nil || back != m {
			t.Errorf("%d: text %q read back as %d", m, text, back)
		}
	}
	var m RestoreMode
	if err := m.UnmarshalText([]byte("slow")); err == nil {
		t.Error("an unknown mode was accepted")
	}
}
