package snapshot

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// left lists what is in a folder besides the scene's layer.
func left(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if e.Name() != "disk.img" {
			names = append(names, e.Name())
		}
	}
	return names
}

// TestCancel: a context that ends in any phase leaves nothing.
func TestCancel(t *testing.T) {
	over, cancel := context.WithCancel(context.Background())
	cancel()
	live := context.Background()
	for phase := range 4 {
		s := newScene(t, 60, 4<<20)
		s.scribble(20)
		o := s.options(None)
		during, stop := context.WithCancel(live)
		if phase == 3 {
			o.Progress = func(uint64, uint64) { stop() }
		}
		w := s.create("snap", o)
		ctx := func(n int) context.Context {
			if n == phase {
				return over
			}
			return during
		}
		all := s.space.NewPageSet()
		all.Add(0, s.space.Size())
		err := w.AddPages(ctx(0), all)
		if err == nil {
			err = w.Capture(ctx(1), Capture{Map: s.pass(false)})
		}
		if err == nil {
			_, err = w.Commit(ctx(2), nil)
		}
		stop()
		if !errors.Is(err, context.Canceled) {
			t.Errorf("phase %d: %v", phase, err)
		}
		if _, again := w.Commit(live, nil); again == nil {
			t.Errorf("phase %d: complete after all", phase)
		}
		if names := left(t, s.dir); len(names) > 0 {
			t.Errorf("phase %d: left: %v", phase, names)
		}
	}
}

// TestAbort leaves nothing, and nothing works after it.
func TestAbort(t *testing.T) {
	s := newScene(t, 61, 1<<20)
	w := s.create("snap", s.options(None))
	if len(left(t, s.dir)) != 1 {
		t.Error("no partial snapshot")
	}
	if err := errors.Join(w.Abort(), w.Abort()); err != nil {
		t.Error(err)
	}
	if err := w.Capture(context.Background(), Capture{}); err == nil {
		t.Error("captured after it was aborted")
	}
	if names := left(t, s.dir); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
	w = s.create("snap", s.options(None))
	s.finish(w, Capture{})
	if err := w.Abort(); err != nil || len(left(t, s.dir)) != 1 {
		t.Errorf("aborting what is complete: %v", err)
	}
}

// TestDiskFull: the error says so, nothing is left, and there is room again.
func TestDiskFull(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("mount a small file system: %v (try: run as root)", err)
	}
	defer unix.Unmount(mount, 0)
	s := newScene(t, 62, 8<<20)
	for gfn := range memory.GFN(8 << 20 / memory.PageSize) {
		s.fill(s.page(gfn))
	}
	for _, c := range []Compression{None, Zstd} {
		target, err := NewTarget(filepath.Join(mount, "snap"))
		if err != nil {
			t.Fatal(err)
		}
		w, err := Create(target, s.options(c))
		if err != nil {
			t.Fatal(err)
		}
		err = w.Capture(context.Background(), Capture{})
		if !errors.Is(err, ErrNoSpace) || !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), mount) {
			t.Errorf("%s: %v", c, err)
		}
		if names := left(t, mount); len(names) > 0 {
			t.Errorf("%s: left: %v", c, names)
		}
	}
}

// TestWrittenLayer: pages are not named by a layer that somebody writes, and are
// stored when their layer is not declared.
func TestWrittenLayer(t *testing.T) {
	s := newScene(t, 63, 1<<20)
	copy(s.page(7), s.content[:4*memory.PageSize])
	copy(s.page(8), s.content[memory.PageSize:])
	o := s.options(None)
	o.Layers[0].Written = true
	w := s.create("written", o)
	if err := w.Capture(context.Background(), Capture{Map: s.pass(false)}); !errors.Is(err, ErrLayerWritten) {
		t.Errorf("a layer that is written: %v", err)
	}
	o = s.options(None)
	o.Layers = nil
	s.save("undeclared", o, Capture{Map: s.pass(false)})
	snap := s.open("undeclared")
	if h := snap.Manifest().Holds; h.Blocks != 0 || h.Unique != 2*memory.PageSize {
		t.Errorf("it holds %+v", h)
	}
	s.checkLoad(snap)
	// A layer may be declared shorter than it was when pages were named.
	o = s.options(None)
	o.Layers[0].Size = memory.PageSize
	s.save("shorter", o, Capture{Map: s.pass(false)})
	if h := s.open("shorter").Manifest().Holds; h.Blocks != 0 || h.Unique != 2*memory.PageSize {
		t.Errorf("it holds %+v", h)
	}
}

// TestMapMustFit: names that may not be true are refused.
func TestMapMustFit(t *testing.T) {
	s := newScene(t, 64, 1<<20)
	other := newScene(t, 64, 2<<20)
	for name, c := range map[string]Capture{
		"made while the guest ran": {Map: s.pass(true)},
		"of another memory":        {Map: other.pass(false)},
		"no parent":                {SinceParent: s.space.NewPageSet()},
	} {
		w := s.create("snap", s.options(None))
		if err := w.Capture(context.Background(), c); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	w := s.create("snap", s.options(None))
	if _, err := w.Commit(context.Background(), nil); err == nil {
		t.Error("complete without memory")
	}
	for _, sections := range [][]Section{{{Name: "../x"}}, {{Name: ""}}, {{Name: "Cpu"}}, {{Name: "a"}, {Name: "a"}}, {{Name: "a", Bytes: make([]byte, MaxSection+1)}}} {
		w := s.create("snap", s.options(None))
		if err := w.Capture(context.Background(), Capture{}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Commit(context.Background(), sections); err == nil {
			t.Errorf("section %q: taken", sections[0].Name)
		}
	}
	if names := left(t, s.dir); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
}

// TestEqualPages: a page that others equal is written after the map was made.
func TestEqualPages(t *testing.T) {
	s := newScene(t, 65, 1<<20)
	s.fill(s.page(10))
	for _, gfn := range []memory.GFN{20, 21, 30} {
		copy(s.page(gfn), s.page(10))
	}
	m := s.pass(true)
	dirty := s.space.NewPageSet()
	for _, gfn := range []memory.GFN{10, 21} {
		s.fill(s.page(gfn))
		dirty.Add(gfn.GPA(), memory.PageSize)
	}
	s.save("snap", s.options(None), Capture{Map: m, Dirty: dirty})
	snap := s.open("snap")
	if h := snap.Manifest().Holds; h.Unique != 3*memory.PageSize || h.Duplicate != memory.PageSize {
		t.Errorf("it holds %+v", h)
	}
	s.checkLoad(snap)
	s.checkReader(snap)
}

// TestRewritten: a page that is stored and becomes zero, and another again.
func TestRewritten(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		s := newScene(t, 66, 1<<20)
		w := s.create("snap", s.options(c))
		set := s.space.NewPageSet()
		set.Add(0, 64*memory.PageSize)
		for i := range 6 {
			for gfn := range memory.GFN(64) {
				if s.fill(s.page(gfn)); i%2 == 1 && gfn%3 == 0 {
					clear(s.page(gfn))
				}
			}
			if err := w.AddPages(context.Background(), set); err != nil {
				t.Fatal(err)
			}
		}
		s.finish(w, Capture{})
		snap := s.open("snap")
		if err := snap.Verify(context.Background(), LoadOptions{}); err != nil {
			t.Error(err)
		}
		s.checkLoad(snap)
		if most := uint64(64 * memory.PageSize); snap.p.pagesSize > most && c == None {
			t.Errorf("%d bytes of pages, more than %d", snap.p.pagesSize, most)
		}
		if c == Zstd && len(snap.p.frames) != 2 {
			t.Errorf("%d frames of 64 pages", len(snap.p.frames))
		}
	}
}

// TestDiscarded: a page that is stored and then given back to the host is zero.
func TestDiscarded(t *testing.T) {
	for _, named := range []bool{true, false} {
		s := newScene(t, 67, 1<<20)
		s.fill(s.page(3))
		s.fill(s.page(4))
		w := s.create("snap", s.options(None))
		set := s.space.NewPageSet()
		set.Add(0, 16*memory.PageSize)
		if err := w.AddPages(context.Background(), set); err != nil {
			t.Fatal(err)
		}
		if err := s.space.Discard(memory.GFN(3).GPA(), memory.PageSize); err != nil {
			t.Fatal(err)
		}
		var c Capture
		if named {
			c.Map = s.pass(false)
		}
		s.finish(w, c)
		snap := s.open("snap")
		if h := snap.Manifest().Holds; h.Unique != memory.PageSize {
			t.Errorf("it holds %+v", h)
		}
		s.checkLoad(snap)
	}
}
