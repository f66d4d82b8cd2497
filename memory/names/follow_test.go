package names

import (
	"bytes"
	"slices"
	"testing"

	"ditto.vm/memory"
)

// lostPages lists a set.
func lostPages(set *memory.PageSet) (all []memory.GFN) {
	for r := range set.Runs() {
		for gfn := r.Start.GFN(); gfn < r.End().GFN(); gfn++ {
			all = append(all, gfn)
		}
	}
	return all
}

// TestFollow: whatever takes a name away puts the page into the set, and before
// the block changes.
func TestFollow(t *testing.T) {
	tab, space, l := table(t, 4<<20, 100)
	read(tab, space, l, 0, pages(0, 90))
	lost := space.NewPageSet()
	tab.Follow(lost)
	for _, tc := range []struct {
		name string
		do   func()
		want []memory.GFN
	}{
		{"nothing", func() {}, nil},
		{"block written", func() { tab.BeginWrite(l, 10*BlockSize, pages(200, 1)) }, []memory.GFN{10}},
		{"it is over", func() { tab.EndWrite(l, 10*BlockSize, pages(200, 1), true) }, nil},
		{"page read into", func() { tab.BeginRead(l, 95*BlockSize, pages(20, 1)) }, []memory.GFN{20}},
		{"erased", func() { tab.BeginErase(l, 30*BlockSize, 2*BlockSize) }, []memory.GFN{30, 31}},
		{"written by the VMM", func() { space.Wrote(40<<12, 1) }, []memory.GFN{40}},
		{"cut short", func() { tab.DropBeyond(l, 89*BlockSize) }, []memory.GFN{89}},
		{"dropped", func() { tab.DropBlocks(l, 50*BlockSize, BlockSize) }, []memory.GFN{50}},
		{"without a name", func() { space.Wrote(40<<12, 1) }, nil},
	} {
		lost.Clear()
		tc.do()
		if got := lostPages(lost); !slices.Equal(got, tc.want) {
			t.Errorf("%s: pages %v lost their names, want %v", tc.name, got, tc.want)
		}
	}
	tab.Follow(nil)
	lost.Clear()
	space.Wrote(60<<12, 1)
	if got := lostPages(lost); got != nil {
		t.Errorf("nobody follows, and pages %v are told", got)
	}
}

// TestFollowCollect: written pages that are collected lose proven names.
func TestFollowCollect(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	s.read(3, 100, 10)
	s.steps(3)
	s.want(10, 10)
	lost := s.space.NewPageSet()
	s.table.Follow(lost)
	s.view(5)[0]++
	written := s.space.NewPageSet()
	if err := s.watch.Collect(s.space.Regions()[0].Range, written, memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if got := lostPages(lost); !slices.Equal(got, []memory.GFN{5}) {
		t.Errorf("pages %v lost their names, want 5", got)
	}
}

// TestProveAll: what is armed is proven at once, of layers that are written; what
// was armed for it is given back but where there are proven names.
func TestProveAll(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(stageFrames)
	other, err := s.table.AddLayer(Layer{Title: "base", Size: 1 << 20, Immutable: true, Source: bytes.NewReader(s.disk)})
	if err != nil {
		t.Fatal(err)
	}
	s.read(3, 100, 40)    // in frame 0
	s.read(1000, 400, 60) // in frames 1 and 2
	s.disk[405*BlockSize]++
	if !s.table.Record(300<<12, OfBlock(other, 3)) {
		t.Fatal("not recorded")
	}
	all := s.space.Regions()[0].Range
	if err := s.watch.Collect(all, s.space.NewPageSet(), memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if err := s.prover.ProveAll(t.Context(), 3); err != nil {
		t.Fatal(err)
	}
	if got := s.table.Stats(); got.NamedProven != 99 || got.Refuted != 1 {
		t.Errorf("of 100 names, one of them false, %d are proven and %d refuted", got.NamedProven, got.Refuted)
	}
	if got := s.table.At(300); got.Proven() {
		t.Error("a name of an immutable layer was proven, which costs reading")
	}
	s.table.SetImmutable(s.layer, true)
	if !s.table.Layers()[s.layer].Immutable {
		t.Error("the layer is not immutable")
	}

	// Of four frames three have proven names.
	if err := s.prover.Take(); err != nil {
		t.Fatal(err)
	}
	written := s.space.NewPageSet()
	if err := s.watch.Collect(all, written, memory.Peek); err != nil {
		t.Fatal(err)
	}
	if got := written.Count(); got != pagesOfFrame || written.CountIn(3*memory.LargeFrameSize, memory.LargeFrameSize) != got {
		t.Errorf("%d pages are not armed, want those of the last frame", got)
	}
	s.settle()
	s.want(100, 99)
}
