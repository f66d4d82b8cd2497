package snapshot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/zeebo/xxh3"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
)

// TestWorkingSet: what is recorded is read by the next, and recorded once.
func TestWorkingSet(t *testing.T) {
	s := newSceneIn(t, quickDir(t), 1, 4<<30)
	s.save("snap", s.options(None), Capture{})
	dir := filepath.Join(s.dir, "snap")
	snap := s.open("snap")
	if _, err := snap.ReadWorkingSet(); !errors.Is(err, ErrNoWorkingSet) {
		t.Errorf("nothing is recorded: %v", err)
	}
	f, err := CreateWorkingSet(dir)
	if err != nil || f == nil {
		t.Fatalf("%v, %v", f, err)
	}
	if other, err := CreateWorkingSet(dir); err != nil || other != nil {
		t.Errorf("two record at once: %v", err)
	}
	if _, err := snap.ReadWorkingSet(); !errors.Is(err, ErrNoWorkingSet) {
		t.Errorf("nothing is recorded yet: %v", err)
	}
	set := s.space.NewPageSet()
	want := []memory.Range{{Start: 0, Size: 3 * memory.PageSize}, {Start: 100 << 20, Size: 1 << 20}, {Start: memory.HoleStart - memory.PageSize, Size: memory.PageSize}, {Start: memory.HoleEnd, Size: memory.PageSize}}
	for _, r := range want {
		set.Add(r.Start, r.Size)
	}
	if err := errors.Join(snap.WriteWorkingSet(f, set), f.Close()); err != nil {
		t.Fatal(err)
	}
	got, err := snap.ReadWorkingSet()
	if err != nil || !cmp.Equal(got, want) {
		t.Errorf("%v, %v", got, err)
	}
	if again, err := CreateWorkingSet(dir); err != nil || again != nil {
		t.Errorf("it is recorded twice: %v", err)
	}
	if err := snap.Verify(t.Context(), LoadOptions{}); err != nil {
		t.Error(err)
	}

	// Each byte counts.
	path := filepath.Join(dir, WorkingSet)
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for at := range b {
		altered := bytes.Clone(b)
		altered[at] ^= 1 << (at % 8)
		if err := os.WriteFile(path, altered, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := snap.ReadWorkingSet(); !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) {
			t.Errorf("byte %d was altered: %v", at, err)
		}
	}
	for n := range b {
		if _, err := decodeWorkingSet(b[:n], snap.id, snap.m.regions()); !errors.Is(err, ErrFormat) {
			t.Errorf("cut to %d bytes: %v", n, err)
		}
	}
	other := snap.id
	other[0]++
	if _, err := decodeWorkingSet(b, other, snap.m.regions()); !errors.Is(err, ErrFormat) {
		t.Errorf("of another snapshot: %v", err)
	}
}

// TestWorkingSetIsBounded: pages that are too scattered are joined, and none is
// lost.
func TestWorkingSetIsBounded(t *testing.T) {
	set := memory.NewPageSet([]memory.Range{{Start: 0, Size: 3 << 30}, {Start: 4 << 30, Size: 1 << 30}})
	for gfn := memory.GFN(0); gfn < 3<<30/memory.PageSize; gfn += 7 {
		set.Add(gfn.GPA(), memory.PageSize)
	}
	set.Add(4<<30, memory.PageSize)
	runs := setRuns(set)
	if len(runs) > maxSetRuns {
		t.Errorf("%d runs", len(runs))
	}
	got := memory.NewPageSet([]memory.Range{{Start: 0, Size: 3 << 30}, {Start: 4 << 30, Size: 1 << 30}})
	for _, r := range runs {
		got.Add(r.Start, r.Size)
	}
	for r := range set.Runs() {
		if got.CountIn(r.Start, r.Size) != r.Size/memory.PageSize {
			t.Fatalf("page %s is lost", r.Start.GFN())
		}
	}
}

// FuzzWorkingSet feeds the decoder working sets, with right sums or not: it
// refuses them, or what it returns is in memory, in order, and the same bytes
// again.
func FuzzWorkingSet(f *testing.F) {
	id := ID{1, 2, 3}
	regions := []memory.Range{{Start: 0, Size: 3 << 30}, {Start: 4 << 30, Size: 1 << 20}}
	f.Add(encodeWorkingSet(id, []memory.Range{{Start: 0, Size: 4096}, {Start: 4 << 30, Size: 1 << 20}}), true)
	f.Add(encodeWorkingSet(id, nil), false)
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed && len(b) >= setHeaderSize {
			b = bytes.Clone(b)
			le := binary.LittleEndian
			copy(b[offSetSnapshot:], id[:])
			le.PutUint64(b[offSetBodySum:], xxh3.Hash(b[setHeaderSize:]))
			le.PutUint64(b[offSetHeaderSum:], xxh3.Hash(b[:offSetHeaderSum]))
		}
		runs, err := decodeWorkingSet(b, id, regions)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) {
				t.Errorf("%v wraps neither ErrFormat nor ErrVersion", err)
			}
			return
		}
		end := memory.GPA(0)
		for _, r := range runs {
			if r.Start < end || r.Size == 0 || !inRegions(r, regions) {
				t.Fatalf("run %v after %s", r, end)
			}
			end = r.End()
		}
		if !bytes.Equal(encodeWorkingSet(id, runs), b) {
			t.Error("encoded again, it is another")
		}
	})
}

// TestPages: reading rows for a lazy restore gives what reading pages gives, and
// a row is of what is read together.
func TestPages(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		s := newSceneIn(t, quickDir(t), 21, 4<<20)
		s.scribble(40)
		last := s.chain(4, c, true)
		pages := last.Pages()
		defer pages.Close()
		total := memory.GFN(4 << 20 / memory.PageSize)
		buf := make([]byte, 64*memory.PageSize)
		for gfn := memory.GFN(0); gfn < total; gfn += 5 {
			n := min(64, total-gfn, 1+gfn%64)
			got := buf[:n*memory.PageSize]
			if err := pages.ReadPages(gfn, got); err != nil {
				t.Fatal(err)
			}
			want, err := s.space.View(gfn.GPA(), uint64(len(got)))
			if err != nil || !bytes.Equal(got, want) {
				t.Fatalf("%s: %d pages from %s on differ, %v", c, n, gfn, err)
			}
			row := pages.Row(gfn)
			if !row.Contains(gfn.GPA(), memory.PageSize) || row.Size%memory.PageSize != 0 || row.Size > map[Compression]uint64{None: rowPages, Zstd: framePages}[c]*memory.PageSize {
				t.Fatalf("%s: page %s is in the row %v", c, gfn, row)
			}
			// A row of what is compressed is of one frame.
			for at := row.Start.GFN(); at < row.End().GFN(); at++ {
				a, _ := last.runOf(gfn)
				b, _ := last.runOf(at)
				if a.packed() != b.packed() || a.packed() && (a.Number+uint64(gfn-a.Start))/framePages != (b.Number+uint64(at-b.Start))/framePages {
					t.Fatalf("page %s is in the row of %s and not in its frame", at, gfn)
				}
			}
		}
		for _, bad := range []struct {
			gfn memory.GFN
			n   int
		}{{total, 1}, {total - 1, 2}, {1 << 50, 1}} {
			if err := pages.ReadPages(bad.gfn, buf[:bad.n*memory.PageSize]); !errors.Is(err, memory.ErrOutOfRange) {
				t.Errorf("%d pages from %s on: %v", bad.n, bad.gfn, err)
			}
		}
		if err := pages.ReadPages(0, buf[:100]); !errors.Is(err, memory.ErrOutOfRange) {
			t.Errorf("a part of a page: %v", err)
		}
	}
}

// TestRetire: a snapshot that is not read any more keeps its layers from being
// written, and what is mapped readable.
func TestRetire(t *testing.T) {
	s := newScene(t, 31, 1<<20)
	for i := range 20 {
		copy(s.page(memory.GFN(10+i)), s.content[i*memory.PageSize:])
	}
	s.fill(s.page(100))
	s.save("snap", s.options(None), Capture{Map: s.pass(false)})
	last := s.open("snap")
	plan, err := last.Plan(t.Context(), PlanOptions{Copied: func(*Snapshot, int) bool { return true }})
	if err != nil {
		t.Fatal(err)
	}
	if plan.Copy.CountIn(memory.GFN(10).GPA(), 20*memory.PageSize) != 20 {
		t.Error("a layer is mapped that may be written")
	}
	if plan, err = last.Plan(t.Context(), PlanOptions{}); err != nil {
		t.Fatal(err)
	}
	space := newSpace(t, s.space.Size())
	if err := space.MapFiles(plan.Maps...); err != nil {
		t.Fatal(err)
	}
	if plan.Copied > 0 {
		t.Errorf("%d bytes are copied", plan.Copied)
	}
	if err := last.Retire(); err != nil {
		t.Fatal(err)
	}
	s.compare(space)
	if _, err := chain.Open(s.path, chain.Options{Format: chain.Raw, AnyLength: true}); !errors.Is(err, disk.ErrLocked) {
		t.Errorf("a layer that is mapped could be opened for writing: %v", err)
	}
	if err := last.Close(); err != nil {
		t.Error(err)
	}
}
