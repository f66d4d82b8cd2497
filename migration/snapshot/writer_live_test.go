package snapshot

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// dump copies all of memory, page by page without touching holes.
func (s *scene) dump() *memory.Space {
	s.t.Helper()
	to := newSpace(s.t, s.space.Size())
	for _, r := range s.space.Regions() {
		err := s.space.Populated(r.Range, func(run memory.Range) {
			src, err := s.space.View(run.Start, run.Size)
			if err == nil {
				err = to.WriteAt(src, run.Start)
			}
			if err != nil {
				s.t.Error(err)
			}
		})
		if err != nil {
			s.t.Fatal(err)
		}
	}
	return to
}

// equalize makes pages equal to others, many of them to the same.
func (s *scene) equalize(rows int, into ...*memory.PageSet) {
	some, _ := s.someRange(1)
	for range rows {
		gfn, n := s.someRange(8)
		for i := range n {
			copy(s.page(gfn+memory.GFN(i)), s.page(some))
		}
		for _, set := range into {
			set.Add(gfn.GPA(), n*memory.PageSize)
		}
	}
}

// TestLiveSave writes memory between all steps of a live save, and after the capture,
// and compares what was saved with what memory was at the capture.
func TestLiveSave(t *testing.T) {
	for seed := range uint64(24) {
		o := seed
		pick := func(n uint64) uint64 {
			k := o % n
			o /= n
			return k
		}
		compression := []Compression{None, Zstd}[pick(2)]
		child, doubtful, prepared := pick(2) == 1, pick(2) == 1, pick(3)
		t.Run(fmt.Sprintf("%d:%s,child=%t,doubt=%t,room=%d", seed, compression, child, doubtful, prepared), func(t *testing.T) {
			s := newSceneIn(t, quickDir(t), 100+seed, 6<<20)
			s.scribble(60)
			s.equalize(20)
			opts := s.options(compression)
			if child {
				s.save("parent", s.options(None), Capture{Map: s.pass(false)})
				s.scribble(10)
				opts.Parent, opts.ParentPath = s.open("parent"), "../parent"
			}
			w := s.create("snap", opts)
			m := s.pass(true)
			written, doubt := s.space.NewPageSet(), s.space.NewPageSet()
			if doubtful { // and rightly so
				s.scribble(10, doubt)
			}
			s.scribble(5, written)
			live := context.Background()
			if err := w.AddMap(live, m, doubt); err != nil {
				t.Fatal(err)
			}
			for range 5 {
				s.scribble(4, written)
				s.equalize(6, written)
				if err := w.AddPages(live, written); err != nil {
					t.Fatal(err)
				}
				written.Clear()
				s.scribble(2, written) // while they are being stored
			}
			if err := w.Sync(); err != nil {
				t.Fatal(err)
			}
			s.scribble(6, written)
			s.equalize(4, written)
			switch prepared {
			case 1:
				w.Prepare(1) // too little
			case 2:
				w.Prepare(1 << 20)
			}
			if err := w.Capture(live, Capture{Dirty: written}); err != nil {
				t.Fatal(err)
			}
			if held := w.held != nil; held != (prepared == 2) {
				t.Errorf("Capture made a copy: %t", held)
			}
			was := s.dump()
			s.scribble(80) // the VM goes on
			s.equalize(40)
			if _, err := w.Commit(live, testSections); err != nil {
				t.Fatal(err)
			}
			if w.Stored() == 0 || w.Manifest() == nil {
				t.Error("nothing is said of what was stored")
			}
			s.space = was
			snap := s.open("snap")
			if err := snap.Verify(live, LoadOptions{}); err != nil {
				t.Error(err)
			}
			s.checkLoad(snap)
			s.checkReader(snap)
		})
	}
}

// TestStandIns: pages that equal one that is written, and then are written one by
// one: one of them is stored in its place each time, and no more.
func TestStandIns(t *testing.T) {
	s := newScene(t, 70, 1<<20)
	s.fill(s.page(10))
	equal := []memory.GFN{20, 21, 22, 23}
	for _, gfn := range equal {
		copy(s.page(gfn), s.page(10))
	}
	w := s.create("snap", s.options(None))
	if err := w.AddMap(t.Context(), s.pass(true), nil); err != nil {
		t.Fatal(err)
	}
	if n := w.stored.Count(); n != 1 {
		t.Fatalf("%d pages were stored, want the one that the others equal", n)
	}
	for i, gfn := range []memory.GFN{10, 20, 22} {
		s.fill(s.page(gfn))
		written := s.space.NewPageSet()
		written.Add(gfn.GPA(), memory.PageSize)
		if err := w.AddPages(t.Context(), written); err != nil {
			t.Fatal(err)
		}
		want := []memory.GFN{20, 21, 21}[i]
		if got := w.live.instead[10]; got != want {
			t.Errorf("after page %s was written, page %s stands in, want %s", gfn, got, want)
		}
	}
	if err := w.Capture(t.Context(), Capture{Dirty: s.space.NewPageSet()}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	snap := s.open("snap")
	if h := snap.Manifest().Holds; h.Unique != 4*memory.PageSize || h.Duplicate != memory.PageSize {
		t.Errorf("it holds %+v", h)
	}
	s.checkLoad(snap)
}

// TestLiveRefuses what cannot be right.
func TestLiveRefuses(t *testing.T) {
	s := newScene(t, 71, 1<<20)
	other := newScene(t, 71, 2<<20)
	m := s.pass(true)
	none := s.space.NewPageSet()
	for name, do := range map[string]func(w *Writer) error{
		"a map of another memory": func(w *Writer) error { return w.AddMap(t.Context(), other.pass(true), nil) },
		"two maps": func(w *Writer) error {
			if err := w.AddMap(t.Context(), m, nil); err != nil {
				t.Error(err)
			}
			return w.AddMap(t.Context(), m, nil)
		},
		"another map in the end": func(w *Writer) error {
			if err := w.AddMap(t.Context(), m, nil); err != nil {
				t.Error(err)
			}
			return w.Capture(t.Context(), Capture{Map: m, Dirty: none})
		},
		"not known what was written": func(w *Writer) error {
			if err := w.AddMap(t.Context(), m, nil); err != nil {
				t.Error(err)
			}
			return w.Capture(t.Context(), Capture{})
		},
	} {
		if err := do(s.create("snap", s.options(None))); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if names := left(t, s.dir); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
}

// TestLower: names move to the layer that holds the block, as far as that is
// declared and long enough.
func TestLower(t *testing.T) {
	s := newScene(t, 72, 1<<20)
	for i := range memory.GFN(6) {
		copy(s.page(20+i), s.content[(10+uint64(i))*memory.PageSize:][:memory.PageSize])
	}
	o := s.options(None)
	base := o.Layers[0]
	base.Names, base.Size, base.Digest = 1, 14*memory.PageSize, nil
	base.Source = bytes.NewReader(s.content)
	base.ID = contentID(s.content[:base.Size])
	o.Layers = append(o.Layers, base)
	var asked [][2]uint64
	o.Layers[0].Lower = func(block, n uint64) (names.LayerID, uint64, error) {
		asked = append(asked, [2]uint64{block, n})
		switch block {
		case 10:
			return 1, 3, nil // three there
		case 13:
			return 0, 1, nil // it has this itself
		case 14:
			return 1, 1, nil // too short
		}
		return 7, 9, nil // not declared, and more than was asked for
	}
	s.save("snap", o, Capture{Map: s.pass(false)})
	want := []Run{
		{Start: 20, Pages: 3, Kind: Block, Layer: 1, Number: 10},
		{Start: 23, Pages: 3, Kind: Block, Layer: 0, Number: 13, Indexed: true}, // the scene has an index of it
	}
	snap, err := Open(s.dir+"/snap", OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	var got []Run
	for _, r := range snap.Runs() {
		if r.Kind == Block {
			got = append(got, r)
		}
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("runs %v, want %v (asked %v)", got, want, asked)
	}
}

// TestChangedLayer: a layer that was changed since memory was captured makes the
// save fail.
func TestChangedLayer(t *testing.T) {
	s := newScene(t, 73, 1<<20)
	o := s.options(None)
	o.Layers[0].Stamped = func() (Stamp, error) { return Stamp{}, fmt.Errorf("it was written") }
	w := s.create("snap", o)
	if err := w.Capture(t.Context(), Capture{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), nil); err == nil || len(left(t, s.dir)) > 0 {
		t.Errorf("%v, left: %v", err, left(t, s.dir))
	}
	o.Layers[0].Stamped = func() (Stamp, error) { return Stamp{Size: 5, Inode: 7}, nil }
	s.save("snap", o, Capture{})
	if got := s.open("snap").Manifest().Layers[0].Stamp; got != (Stamp{Size: 5, Inode: 7}) {
		t.Errorf("stamp %+v", got)
	}
}

// TestHeldInPieces: a copy is stored in other pieces than it was made in.
func TestHeldInPieces(t *testing.T) {
	s := newScene(t, 74, 16<<20)
	w := s.create("snap", s.options(None))
	all := s.space.NewPageSet()
	all.Add(0, s.space.Size())
	ctx := context.Background()
	if err := w.AddMap(ctx, s.pass(true), all); err != nil {
		t.Fatal(err)
	}
	written := s.space.NewPageSet()
	for gfn := range memory.GFN(1000) {
		if gfn%300 != 299 { // runs of more than a batch
			s.fill(s.page(gfn + 1))
			written.Add((gfn + 1).GPA(), memory.PageSize)
		}
	}
	w.Prepare(1 << 20)
	if err := w.Capture(ctx, Capture{Dirty: written}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(ctx, testSections); err != nil {
		t.Fatal(err)
	}
	s.checkLoad(s.open("snap"))
}
