package snapshot

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/memory"
)

// chain makes so many snapshots, each adding to the one before, and returns the
// last, open.
func (s *scene) chain(n int, c Compression, tracked bool) *Snapshot {
	s.t.Helper()
	var last *Snapshot
	since := s.space.NewPageSet()
	for i := range n {
		s.scribble(6, since)
		o := s.options(c)
		o.Parent = last
		capture := Capture{Map: s.pass(false)}
		if last != nil {
			o.ParentPath = "../" + filepath.Base(last.Dir())
			if tracked {
				capture.SinceParent = since
			}
		}
		name := fmt.Sprintf("snap%d", i)
		s.save(name, o, capture)
		since = s.space.NewPageSet()
		last = s.open(name)
	}
	return last
}

// TestChain: 20 incremental snapshots are one whole one.
func TestChain(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		for _, tracked := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/tracked=%v", c, tracked), func(t *testing.T) {
				s := newSceneIn(t, quickDir(t), 30, 4<<20)
				s.scribble(30)
				last := s.chain(20, c, tracked)
				if d := last.Manifest().Depth(); d != 19 {
					t.Errorf("%d ancestors", d)
				}
				h := last.Manifest().Holds
				if h.Parent == 0 || h.Unique >= h.Parent {
					t.Errorf("the last holds %+v", h)
				}
				if err := last.Verify(context.Background(), LoadOptions{}); err != nil {
					t.Error(err)
				}
				s.checkLoad(last)
				s.checkReader(last)
				s.checkPlan(last, PlanOptions{})

				s.save("full", s.options(c), Capture{Map: s.pass(false)})
				full := s.open("full")
				s.checkLoad(full)
				if f := full.Manifest().Holds; f.Zero != h.Zero || f.Blocks != h.Blocks {
					t.Errorf("whole, it holds %+v, the last of a chain %+v", f, h)
				}
			})
		}
	}
}

// countedLayer tells when it is closed.
type countedLayer struct {
	LayerFile
	open *int
}

func (l countedLayer) Close() error {
	*l.open--
	return l.LayerFile.Close()
}

// TestChainOpensLayersOnce: however many snapshots name pages by a layer, there is
// one open file of it, until the last of them is closed.
func TestChainOpensLayersOnce(t *testing.T) {
	s := newSceneIn(t, quickDir(t), 31, 2<<20)
	s.scribble(30)
	path := s.chain(8, None, true).Dir()

	var o OpenOptions
	o.complete()
	open, opened, inner := 0, 0, o.OpenLayer
	o.OpenLayer = func(dir string, l Layer) (LayerFile, error) {
		f, err := inner(dir, l)
		if err != nil {
			return nil, err
		}
		open, opened = open+1, opened+1
		return countedLayer{f, &open}, nil
	}
	last, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := last.Verify(t.Context(), LoadOptions{Workers: 1}); err != nil {
		t.Error(err)
	}
	namers := 0
	for one := last; one != nil; one = one.parent {
		if one.usedLayers()[0] {
			namers++
		}
	}
	if namers < 2 {
		t.Fatalf("%d snapshots name pages by the layer", namers)
	}
	if open != 1 || opened != 1 {
		t.Errorf("%d snapshots opened the layer %d times, %d of them are open", namers, opened, open)
	}
	if err := last.Close(); err != nil {
		t.Error(err)
	}
	if open != 0 {
		t.Errorf("%d are still open after the last snapshot was closed", open)
	}
}

// TestLiveIncremental: pages are stored early, some equal the parent's, and
// some of these are written after that.
func TestLiveIncremental(t *testing.T) {
	for seed := range uint64(5) {
		s := newSceneIn(t, quickDir(t), 40+seed, 4<<20)
		s.scribble(30)
		base := s.chain(2, None, false)
		s.scribble(5)
		o := s.options(None)
		o.Parent, o.ParentPath = base, base.Dir()
		w := s.create("live", o)
		all := s.space.NewPageSet()
		all.Add(0, s.space.Size())
		if err := w.AddPages(context.Background(), all); err != nil {
			t.Fatal(err)
		}
		dirty := s.space.NewPageSet()
		s.scribble(5, dirty)
		m := s.pass(true)
		s.scribble(5, dirty)
		s.finish(w, Capture{Map: m, Dirty: dirty})
		live := s.open("live")
		if err := live.Verify(context.Background(), LoadOptions{}); err != nil {
			t.Error(err)
		}
		s.checkLoad(live)
	}
}

// TestParentGone: without the very parent a snapshot cannot be opened, but it
// may be elsewhere.
func TestParentGone(t *testing.T) {
	s := newScene(t, 50, 2<<20)
	s.scribble(20)
	s.chain(2, None, false)
	child, parent := filepath.Join(s.dir, "snap1"), filepath.Join(s.dir, "snap0")
	reopen := func() error {
		snap, err := Open(child, OpenOptions{})
		if err == nil {
			err = snap.Close()
		}
		return err
	}
	os.Rename(parent, parent+".moved")
	if err := reopen(); err != nil {
		t.Errorf("the parent has another name: %v", err)
	}
	s.scribble(1)
	s.save("snap0", s.options(None), Capture{})
	if err := reopen(); err != nil {
		t.Errorf("another has the parent's name: %v", err)
	}
	hidden := t.TempDir()
	os.Rename(parent+".moved", filepath.Join(hidden, "x"))
	if err := reopen(); !errors.Is(err, ErrParent) {
		t.Errorf("the parent is another: %v", err)
	}
	os.RemoveAll(parent)
	if err := reopen(); !errors.Is(err, ErrParent) {
		t.Errorf("there is no parent: %v", err)
	}
	find := func(string, Parent) (string, error) { return filepath.Join(hidden, "x"), nil }
	snap, err := Open(child, OpenOptions{FindParent: find})
	if err != nil {
		t.Fatal(err)
	}
	snap.Close()
	os.Truncate(filepath.Join(hidden, "x", PagesName), 4096)
	if _, err := Open(child, OpenOptions{FindParent: find}); !errors.Is(err, ErrParent) || !errors.Is(err, ErrFormat) {
		t.Errorf("the parent is truncated: %v", err)
	}
}

// TestChainBound: a chain ends.
func TestChainBound(t *testing.T) {
	s := newSceneIn(t, quickDir(t), 51, 1<<20)
	s.fill(s.page(3))
	last := s.chain(MaxChain, None, false)
	o := s.options(None)
	o.Parent, o.ParentPath = last, last.Dir()
	target, err := NewTarget(filepath.Join(s.dir, "more"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(target, o); err == nil {
		t.Error("a chain without end")
	}
	s.checkLoad(last)
}

// TestParentOfOtherMemory is refused.
func TestParentOfOtherMemory(t *testing.T) {
	s := newScene(t, 52, 1<<20)
	s.fill(s.page(3))
	s.save("base", s.options(None), Capture{})
	o := s.options(None)
	o.Parent, o.ParentPath = s.open("base"), "../base"
	o.Space = newSpace(t, 2<<20)
	target, err := NewTarget(filepath.Join(s.dir, "child"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Create(target, o); err == nil {
		t.Error("the parent of another memory was taken")
	}
	if err := s.open("base").Load(context.Background(), newSpace(t, 2*memory.MinSize), LoadOptions{}); err == nil {
		t.Error("loaded into another memory")
	}
}
