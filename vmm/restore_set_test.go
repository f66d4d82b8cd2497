package vmm

import (
	"errors"
	"fmt"
	"testing"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

// TestRestoreRecords: what the guest touched is recorded once, and the next
// restore has it before the guest asks.
func TestRestoreRecords(t *testing.T) {
	for compression, timely := range map[snapshot.Compression]bool{snapshot.None: true, snapshot.Zstd: false} {
		t.Run(fmt.Sprintf("%s/timely=%v", compression, timely), func(t *testing.T) {
			c := writerConfig()
			dir, _ := savedWriter(t, c, compression)
			set, err := snapshot.CreateWorkingSet(dir)
			if err != nil || set == nil {
				t.Fatal(set, err)
			}
			ctx := deadline(t)
			m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
			if timely {
				m.restored.record.left = 50 * time.Millisecond
			}
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			if err := errors.Join(m.Pause(ctx), m.Resume(ctx)); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			if timely {
				await(t, ctx, "the working set is written", func() bool { return m.restored.done.Load() })
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}

			s, err := snapshot.Open(dir, snapshot.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			runs, err := s.ReadWorkingSet()
			if err = errors.Join(err, s.Close()); err != nil {
				t.Fatal(err)
			}
			m = restoreFrom(t, dir, SnapshotOptions{Config: c})
			before := m.restored.stats()
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = restoreFrom(t, dir, SnapshotOptions{Config: c, Mode: RestorePrefetch})
			<-m.restored.prefetched
			after := m.restored.stats()
			there, all := m.mem.NewPageSet(), uint64(0)
			if err := m.mem.FilesTouched(func(r memory.Range) { there.Add(r.Start, r.Size) }); err != nil {
				t.Fatal(err)
			}
			for _, r := range runs {
				all += r.Size
				if m.restored.missing != nil {
					if err := m.restored.missing.Fetch(ctx, r); err != nil {
						t.Fatal(err)
					}
				}
			}
			if now := m.restored.stats(); now.CopiedBytes != after.CopiedBytes {
				t.Errorf("%d bytes of the working set were still missing", now.CopiedBytes-after.CopiedBytes)
			}
			got := there.Count()*memory.PageSize + before.MissingBytes + before.CopiedBytes - after.MissingBytes
			if all == 0 || all > 40<<20 || got < all {
				t.Errorf("a working set of %d bytes, and %d are there", all, got)
			}
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			finishWriter(t, m)
		})
	}
}

// TestRestoreNeverRan: a machine that was restored and never ran records nothing.
func TestRestoreNeverRan(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.None)
	set, err := snapshot.CreateWorkingSet(dir)
	if err != nil || set == nil {
		t.Fatal(set, err)
	}
	m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := snapshot.CreateWorkingSet(dir)
	if err != nil || again == nil {
		t.Fatalf("a working set is there: %v", err)
	}
	again.Close()
}
