package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// TestSaveMeetsWrites: what happens to a page or its block between any two steps
// of a save is in the snapshot.
func TestSaveMeetsWrites(t *testing.T) {
	for name, do := range map[string]func(r *saveRig){
		"block written":             func(r *saveRig) { r.write(10, 500, 1) },
		"block written with zeros":  func(r *saveRig) { r.write(10, 6000, 1) },
		"page written":              func(r *saveRig) { r.store(10, 7) },
		"page read into":            func(r *saveRig) { r.read(20, 10, 1) },
		"page written to its block": func(r *saveRig) { r.write(10, 10, 1) },
		"page and block":            func(r *saveRig) { r.store(10, 9); r.write(10, 10, 1) },
		"block moved":               func(r *saveRig) { r.write(10, 500, 1); r.read(10, 600, 1); r.read(11, 10, 1) },
		"page discarded": func(r *saveRig) {
			if err := r.m.mem.Discard(r.buffer(10, 1).Start, memory.PageSize); err != nil {
				r.t.Error(err)
			}
		},
		"equal page written": func(r *saveRig) { r.store(5000, 3) },
		"restart":            func(r *saveRig) { r.m.request(requestReset) },
		"looked at": func(r *saveRig) {
			if _, err := r.m.Memory(r.t.Context(), api.MemoryQuery{Full: true, Pause: true}); err != nil {
				r.t.Error(err)
			}
		},
		"paused and resumed": func(r *saveRig) {
			if err := errors.Join(r.m.Pause(r.t.Context()), r.m.Resume(r.t.Context())); err != nil {
				r.t.Error(err)
			}
			r.m.mu.Lock()
			defer r.m.mu.Unlock()
			if r.m.background.cancel != nil {
				r.t.Error("the prover may arm frames while memory is saved")
			}
		},
	} {
		// Before each collection, and when all pages were just named.
		const named = 3
		for step := range named + 1 {
			t.Run(fmt.Sprintf("%s/%d", name, step), func(t *testing.T) {
				r := newSaveRig(t, "spin", nil)
				r.readAll()
				r.equalPages()
				r.watch.rearm = func(n int) {
					if n == step {
						do(r)
					}
				}
				var once sync.Once
				r.save("snap", SaveOptions{Progress: func(p SaveProgress) {
					if step == named && p.Phase == SaveMemory && p.Done == p.Total/2 {
						once.Do(func() { do(r) })
					}
				}})
				if r.watch.n < 3 {
					t.Fatalf("the save has %d collections", r.watch.n)
				}
				r.check(r.open("snap"), r.watch.takeDump(t))
			})
		}
	}
}

// TestSaveAfterRestart: a restart that the guest has asked for is no part of a
// state, and goes first.
func TestSaveAfterRestart(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.watch.peek = func() {
		if r.m.resetDue.Load() {
			t.Error("a machine that is to restart was captured")
		}
	}
	var served sync.WaitGroup
	r.save("snap", SaveOptions{Progress: func(p SaveProgress) {
		if p.Phase == SavePause {
			r.m.resetDue.Store(true)
			served.Go(func() {
				time.Sleep(5 * standAgain) // in place of the supervisor
				r.m.resetDue.Store(false)
			})
		}
	}})
	served.Wait()
	r.check(r.open("snap"), r.watch.takeDump(t))
	r.finish()
}

// TestSaveDoubts: more pages equal a block than names of it are kept; that it is
// written later must not change them.
func TestSaveDoubts(t *testing.T) {
	r := newSaveRig(t, "spin", func(c *config.Config) { buildIndex(t, c.Disks[0].Path) })
	for page := range 100 {
		if err := r.m.mem.WriteAt(r.content[10*memory.PageSize:][:memory.PageSize], r.buffer(page, 1).Start); err != nil {
			t.Fatal(err)
		}
	}
	r.watch.rearm = func(n int) {
		if n == 1 {
			r.write(10, 500, 1)
		}
	}
	r.save("snap", SaveOptions{})
	r.check(r.open("snap"), r.watch.takeDump(t))
}

// TestSaveNamesTheLowest: pages that the base holds are named by the base, with
// its identity by content, and what was written since by the layer above.
func TestSaveNamesTheLowest(t *testing.T) {
	var base string
	r := newSaveRig(t, "spin", func(c *config.Config) {
		base = c.Disks[0].Path
		buildIndex(t, base)
		top := filepath.Join(quickDir(t), "root.qcow2")
		if err := chain.CreateOverlay(top, base, chain.Raw, namesDisk); err != nil {
			t.Fatal(err)
		}
		c.Disks[0].Path = top
	})
	b := r.buffer(7000, 3)
	page := bytes.Repeat([]byte("mine"), int(b.Size)/4)
	if err := r.m.mem.WriteAt(page, b.Start); err != nil {
		t.Fatal(err)
	}
	r.write(1000, 7000, 3)
	r.readAll()
	report := r.save("snap", SaveOptions{})
	s := r.open("snap")
	r.check(s, r.watch.takeDump(t))
	held := map[string]uint64{}
	for _, run := range s.Runs() {
		if run.Kind == snapshot.Block {
			held[s.Manifest().Layers[run.Layer].Path] += run.Pages
		}
	}
	// A cluster of the overlay holds 16 blocks.
	if whole := uint64(namesDisk / memory.PageSize); held[base] < whole-32 || held[r.c.Disks[0].Path] < 3 || held[base]+held[r.c.Disks[0].Path] < whole {
		t.Errorf("blocks by layer: %v", held)
	}
	index, err := index.Open(index.Beside(base))
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close()
	if l := s.Manifest().Layers[0]; l.Path != base || l.ID != index.LayerID() {
		t.Errorf("the base is %+v, its index is of %s", l, index.LayerID())
	}
	if report.Holds.Unique > 1<<20 {
		t.Errorf("the snapshot of a guest that does nothing holds %+v", report.Holds)
	}
	// What is stacked on it now names nothing yet; a second one finds it all.
	again := r.save("again", SaveOptions{Parent: "snap"})
	if again.Holds.Unique > 1<<20 || again.Stored > 1<<20 {
		t.Errorf("the second holds %+v in %d bytes", again.Holds, again.Stored)
	}
	r.check(r.open("again"), r.watch.takeDump(t))
}

// TestSaveChangedLayer: an image that somebody changes is named by no snapshot.
func TestSaveChangedLayer(t *testing.T) {
	var base string
	r := newSaveRig(t, "spin", func(c *config.Config) {
		base = c.Disks[0].Path
		buildIndex(t, base)
		c.Disks[0].ReadOnly = true
	})
	r.readAll()
	images, files := r.images(), listDir(t, filepath.Dir(base))
	r.watch.rearm = func(n int) {
		if n != 1 {
			return
		}
		f, err := os.OpenFile(base, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("changed"), 5*memory.PageSize); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.m.Save(deadline(t), r.local("snap", ""), SaveOptions{}); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("%v", err)
	}
	if got := r.images(); !slices.Equal(got, images) || !slices.Equal(listDir(t, filepath.Dir(base)), files) {
		t.Errorf("the disk is %v in %v", got, listDir(t, filepath.Dir(base)))
	}
	r.watch.rearm = nil
	r.watch.takeDump(t)
	if report := r.save("snap", SaveOptions{}); report.Holds.Blocks != 0 {
		t.Errorf("it holds %+v", report.Holds)
	}
	r.check(r.open("snap"), r.watch.takeDump(t))
}
