package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// TestRoundTrip saves random memories in every way and reads them in every way.
func TestRoundTrip(t *testing.T) {
	for _, compression := range []Compression{None, Zstd} {
		for _, named := range []bool{true, false} {
			for seed := range uint64(6) {
				t.Run(fmt.Sprintf("%s/named=%v/%d", compression, named, seed), func(t *testing.T) {
					s := newScene(t, seed, 6<<20)
					s.scribble(40)
					s.fill(s.page(9))
					copy(s.page(700), s.page(9))
					copy(s.page(702), s.page(9))
					var c Capture
					if named {
						c.Map = s.pass(false)
					}
					s.save("snap", s.options(compression), c)
					s.checkAll(s.open("snap"), named)
				})
			}
		}
	}
}

// checkAll reads a snapshot in every way.
func (s *scene) checkAll(snap *Snapshot, named bool) {
	t := s.t
	t.Helper()
	h := snap.Manifest().Holds
	if sum := h.Zero + h.Blocks + h.Duplicate + h.Parent + h.Unique; sum != s.space.Size() {
		t.Errorf("it holds %d bytes of %d", sum, s.space.Size())
	}
	if named != (h.Blocks > 0) || named != (h.Duplicate > 0) || h.Unique == 0 || h.Zero == 0 {
		t.Errorf("it holds %+v", h)
	}
	if err := snap.Verify(context.Background(), LoadOptions{}); err != nil {
		t.Error(err)
	}
	got := snap.Sections()
	if len(got) != len(testSections) || got[0].Name != "cpu" || got[0].Version != 3 || string(got[0].Bytes) != "registers" || len(got[1].Bytes) != 0 {
		t.Errorf("sections %+v", got)
	}
	s.checkLoad(snap)
	s.checkReader(snap)
	for _, o := range []PlanOptions{{}, {MinPages: 8}, {MaxMappings: 3}} {
		s.checkPlan(snap, o)
	}
}

// checkReader reads each page by itself, in any order.
func (s *scene) checkReader(snap *Snapshot) {
	s.t.Helper()
	r := snap.NewReader()
	defer r.Close()
	var page [memory.PageSize]byte
	for _, region := range s.space.Regions() {
		if region.Size > 64<<20 {
			continue
		}
		for _, i := range s.rng.Perm(int(region.Size / memory.PageSize)) {
			gfn := region.Start.GFN() + memory.GFN(i)
			if err := r.ReadPage(gfn, page[:]); err != nil {
				s.t.Fatal(err)
			}
			if !bytes.Equal(page[:], s.page(gfn)) {
				s.t.Fatalf("page %s differs", gfn)
			}
		}
	}
}

// checkPlan does what a plan says and compares.
func (s *scene) checkPlan(snap *Snapshot, o PlanOptions) {
	t := s.t
	t.Helper()
	plan, err := snap.Plan(context.Background(), o)
	if err != nil {
		t.Fatal(err)
	}
	if o.MaxMappings > 0 && len(plan.Maps) > o.MaxMappings {
		t.Errorf("%d mappings, more than %d", len(plan.Maps), o.MaxMappings)
	}
	r := snap.NewReader()
	defer r.Close()
	space := newSpace(t, s.space.Size())
	at, mapped := memory.GPA(0), uint64(0)
	for _, row := range plan.Maps {
		if row.Start < at || row.Size < o.MinPages*memory.PageSize || plan.Copy.CountIn(row.Start, row.Size) > 0 {
			t.Fatalf("%d bytes are mapped at %s after %s", row.Size, row.Start, at)
		}
		at, mapped = row.End(), mapped+row.Size
		b, err := unix.Mmap(int(row.File.Fd()), row.Offset, int(row.Size), unix.PROT_READ, unix.MAP_PRIVATE)
		if err != nil {
			t.Fatal(err)
		}
		if err := space.WriteAt(b, row.Start); err != nil {
			t.Fatal(err)
		}
		unix.Munmap(b)
	}
	for row := range plan.Copy.Runs() {
		dst, err := space.Writable(row.Start, row.Size)
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(dst); off += memory.PageSize {
			if err := r.ReadPage((row.Start + memory.GPA(off)).GFN(), dst[off:][:memory.PageSize]); err != nil {
				t.Fatal(err)
			}
		}
	}
	if h := snap.Manifest().Holds; snap.Parent() == nil && plan.Mapped+plan.Copied != s.space.Size()-h.Zero || plan.Mapped != mapped || plan.Copied != plan.Copy.Count()*memory.PageSize {
		t.Errorf("a plan for %d and %d bytes of %+v", plan.Mapped, plan.Copied, h)
	}
	s.compare(space)
}

// TestLive: pages are stored while the guest writes; in the end memory is what
// it was when it was paused.
func TestLive(t *testing.T) {
	for _, compression := range []Compression{None, Zstd} {
		for _, known := range []bool{true, false} { // what was written
			for seed := range uint64(5) {
				t.Run(fmt.Sprintf("%s/known=%v/%d", compression, known, seed), func(t *testing.T) {
					s := newScene(t, 100+seed, 6<<20)
					s.scribble(40)
					w := s.create("snap", s.options(compression))
					all, dirty := s.space.NewPageSet(), s.space.NewPageSet()
					all.Add(0, s.space.Size())
					for range 3 {
						if err := w.AddPages(context.Background(), all); err != nil {
							t.Fatal(err)
						}
						all.Clear()
						s.scribble(10, all)
					}
					// These are written again, but not added.
					for r := range all.Runs() {
						dirty.Add(r.Start, r.Size)
					}
					c := Capture{Map: s.pass(known)}
					if known {
						// The map is older than the last writes.
						s.scribble(10, dirty)
						c.Dirty = dirty
					}
					s.finish(w, c)
					snap := s.open("snap")
					if err := snap.Verify(context.Background(), LoadOptions{}); err != nil {
						t.Error(err)
					}
					s.checkLoad(snap)
				})
			}
		}
	}
}

// TestSameBytes: a snapshot does not depend on the number of workers.
func TestSameBytes(t *testing.T) {
	s := newScene(t, 7, 8<<20)
	s.scribble(60)
	var ids []ID
	for i, workers := range []int{1, 2, 5} {
		o := s.options(None)
		o.Workers = workers
		ids = append(ids, s.save(fmt.Sprint("snap", i), o, Capture{Map: s.pass(false)}))
	}
	if ids[0] != ids[1] || ids[0] != ids[2] {
		t.Errorf("identities %v", ids)
	}
}

// TestHoles: memory above 4 GiB, and pages that were never touched stay so.
func TestHoles(t *testing.T) {
	s := newScene(t, 8, 3<<30+4<<20)
	for _, gpa := range []memory.GPA{0, memory.HoleStart - memory.PageSize, memory.HoleEnd, memory.HoleEnd + 4<<20 - memory.PageSize} {
		s.fill(s.page(gpa.GFN()))
	}
	copy(s.page(memory.HoleEnd.GFN()+1), s.content)
	s.save("snap", s.options(None), Capture{Map: s.pass(false)})
	snap := s.open("snap")
	if h := snap.Manifest().Holds; h.Unique != 4*memory.PageSize || h.Blocks != memory.PageSize {
		t.Errorf("it holds %+v", h)
	}
	space := newSpace(t, s.space.Size())
	if err := snap.Load(context.Background(), space, LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	s.compare(space)
	populated := uint64(0)
	for _, r := range space.Regions() {
		if err := space.Populated(r.Range, func(r memory.Range) { populated += r.Size }); err != nil {
			t.Fatal(err)
		}
	}
	if populated != 5*memory.PageSize {
		t.Errorf("%d bytes are populated", populated)
	}
}
