package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/chain"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// TestSave saves a guest that writes at full speed, and a disk that is read and
// written meanwhile, again and again, and compares each snapshot with what memory
// was in the pause.
func TestSave(t *testing.T) {
	type variant struct {
		names       bool
		tracker     memory.TrackerKind
		compression snapshot.Compression
		child       bool
	}
	for _, v := range []variant{
		{true, memory.TrackerWPAsync, snapshot.None, true}, {true, memory.TrackerWPAsync, snapshot.Zstd, false},
		{false, memory.TrackerWPAsync, snapshot.None, false}, {false, memory.TrackerWPAsync, snapshot.Zstd, true},
		{true, memory.TrackerKVMLog, snapshot.Zstd, true}, {false, memory.TrackerKVMLog, snapshot.None, false},
		{true, memory.TrackerKVMRing, snapshot.None, false},
	} {
		t.Run(fmt.Sprintf("%s,names=%t,%s,child=%t", v.tracker, v.names, v.compression, v.child), func(t *testing.T) {
			r := newSaveRig(t, saveSpec, func(c *config.Config) {
				c.Memory.Names, c.Memory.Tracker = config.OnOff(v.names), v.tracker
			})
			r.readAll()
			parent := ""
			for i := range labtest.Count(2, 10) {
				stop := r.traffic(uint64(i))
				name := fmt.Sprintf("snap%d", i)
				o := SaveOptions{Compression: v.compression}
				if v.child {
					o.Parent = parent
				}
				report := r.save(name, o)
				parent = name
				stop()
				t.Logf("%+v", report)
				s := r.open(name)
				r.check(s, r.watch.takeDump(t))
				r.checkRuns()
				if report.ID != s.ID() || report.Holds != s.Manifest().Holds || report.Rounds < 2 || report.Pause == 0 || report.Stored == 0 {
					t.Errorf("report %+v", report)
				}
				if (s.Parent() != nil) != (o.Parent != "") {
					t.Errorf("the parent is %v", s.Parent())
				}
				if named := report.Holds.Blocks > 0; named != v.names {
					t.Errorf("the snapshot holds %+v", report.Holds)
				}
				if len(r.images()) != i+2 || report.Overlays[0] != r.m.disks[0].image.Path() {
					t.Errorf("the disk is %v, and said to be %v", r.images(), report.Overlays)
				}
			}
			r.finish()
		})
	}
}

// TestSaveRace overwrites blocks and buffers all the time while snapshots are
// made, every other on the one before.
func TestSaveRace(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	stop := r.traffic(77)
	saves := labtest.Count(3, 50)
	var named, pages uint64
	for i := range saves {
		o := SaveOptions{Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd, snapshot.Zstd}[i%3]}
		if i%2 == 1 {
			o.Parent = fmt.Sprintf("snap%d", i-1)
		}
		before := r.overwritten.Load()
		report := r.save(fmt.Sprintf("snap%d", i), o)
		named, pages = named+report.Holds.Blocks/memory.PageSize, pages+uint64(r.overwritten.Load()-before)
		r.check(r.open(fmt.Sprintf("snap%d", i)), r.watch.takeDump(t))
		await(t, deadline(t), "blocks and buffers are overwritten", func() bool { return r.overwritten.Load() > int64(i+1)*1000 })
	}
	stop()
	r.finish()
	if named == 0 || pages == 0 {
		t.Errorf("%d pages were named by blocks, %d overwritten during the saves", named, pages)
	}
	if !t.Failed() {
		labtest.Proof(t, "snapshot-race", "%d snapshots of a guest that writes at full speed while %d blocks and buffers of its disk were overwritten, %d of them during the saves: %d pages named by blocks, none not what it was in the pause",
			saves, r.overwritten.Load(), pages, named)
	}
}

// TestSaveGoesOn: what was saved runs, from a snapshot of a snapshot, with the
// disk that it had.
func TestSaveGoesOn(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	r.write(3, 200, 5)
	r.save("first", SaveOptions{})
	want := slices.Clone(r.content)
	r.write(4, 300, 5) // is not in the disk that was saved
	s := r.open("first")
	m := r.restore(s)
	got := make([]byte, namesDisk)
	if err := m.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk is not what it was, %v", err)
	}
	before := mustStatus(t, m)
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	other := &saveRig{t: t, m: m, c: m.cfg, content: want, dir: r.dir}
	other.save("second", SaveOptions{Parent: "first"})
	other.finish()
	r.finish()

	again := r.restore(r.open("second"))
	if now := mustStatus(t, again); now.Writes <= before.Writes {
		t.Errorf("%d writes in the second snapshot, %d in the first", now.Writes, before.Writes)
	}
	if err := again.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	(&saveRig{t: t, m: again}).finish()
}

// TestSaveConfig: the manifest says how to make the machine again.
func TestSaveConfig(t *testing.T) {
	r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Disks[0].Serial = "A1" })
	r.save("snap", SaveOptions{})
	s := r.open("snap")
	got, err := config.Parse(s.Manifest().Config)
	if err != nil {
		t.Fatal(err)
	}
	want := r.c
	want.Nets = []config.Net{}
	want.Disks[0].Format = chain.Raw
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, l, ok := s.Locate(got.Disks[0].Path); !ok || l.Format != string(chain.Raw) || l.Stamp == (snapshot.Stamp{}) {
		t.Errorf("the disk is not among the layers: %+v", s.Manifest().Layers)
	}
	// The next one is of what was stacked.
	r.save("next", SaveOptions{})
	if got, err = config.Parse(r.open("next").Manifest().Config); err != nil || got.Disks[0].Format != chain.Qcow2 || got.Disks[0].Path == want.Disks[0].Path {
		t.Errorf("its disks are %+v, %v", got.Disks, err)
	}
	r.finish()
}

// TestSavePaused: a VM that is paused stays so, and one that is paused for the
// save runs on.
func TestSavePaused(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	report := r.save("first", SaveOptions{Paused: true})
	r.check(r.open("first"), r.watch.takeDump(t))
	r.checkRuns()
	if report.Pause == 0 || report.Pause < report.Took/4 {
		t.Errorf("paused for %s of %s", report.Pause, report.Took)
	}
	if err := r.m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := mustStatus(t, r.m)
	report = r.save("second", SaveOptions{})
	r.check(r.open("second"), r.watch.takeDump(t))
	if state := r.m.Info().State; state != api.Paused || report.Pause != 0 {
		t.Errorf("a paused VM is %s after it was saved, and was paused for %s", state, report.Pause)
	}
	if now := mustStatus(t, r.m); now.Writes != before.Writes {
		t.Error("a paused VM ran while it was saved")
	}
	if err := r.m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkRuns()
	r.finish()
}

// TestSaveUntracked: without a tracker all of it is done in the pause.
func TestSaveUntracked(t *testing.T) {
	r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Memory.Tracker = memory.TrackerNone })
	r.readAll()
	report := r.save("snap", SaveOptions{Compression: snapshot.Zstd})
	s := r.open("snap")
	if report.Rounds != 0 || report.Holds.Blocks < namesDisk {
		t.Errorf("report %+v", report)
	}
	r.checkRuns()
	m := r.restore(s)
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	(&saveRig{t: t, m: m}).finish()
	r.finish()
}

// TestSaveStop: the VM ends when it is saved, its disk is frozen and has no
// overlay.
func TestSaveStop(t *testing.T) {
	for _, names := range []bool{true, false} {
		r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Memory.Names = config.OnOff(names) })
		r.readAll()
		r.write(7, 100, 3)
		report := r.save("snap", SaveOptions{Stop: true, Progress: func(p SaveProgress) {
			if p.Phase == SaveCommit {
				if err := r.m.Resume(t.Context()); !errors.Is(err, api.ErrWrongState) {
					t.Errorf("what is saved and is to end runs on: %v", err)
				}
			}
		}})
		exit, err := r.m.Wait(deadline(t))
		if err != nil || exit.Reason != ExitSaved {
			t.Fatalf("exit %+v, %v", exit, err)
		}
		if err := r.m.Close(); err != nil {
			t.Fatal(err)
		}
		if report.Overlays[0] != "" {
			t.Errorf("overlays %v", report.Overlays)
		}
		path := r.c.Disks[0].Path
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, r.content) {
			t.Errorf("the disk is not what it was, %v", err)
		}
		if files := listDir(t, filepath.Dir(path)); !slices.Equal(files, []string{filepath.Base(path) + " -r--------"}) {
			t.Errorf("beside the disk is %v", files)
		}
		s := r.open("snap")
		r.check(s, r.watch.takeDump(t))
		if err := s.CheckLayers(t.Context()); err != nil {
			t.Error(err)
		}
		m := r.restore(s)
		if err := m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		(&saveRig{t: t, m: m}).finish()
	}
}

// TestSaveLetsGo: after a save the guest writes without being noticed, but where
// names are proven.
func TestSaveLetsGo(t *testing.T) {
	for _, on := range []bool{true, false} {
		r := newSaveRig(t, "spin", func(c *config.Config) { c.Memory.Names = config.OnOff(on) })
		if r.m.tracker.Kind() != memory.TrackerWPAsync {
			t.Skip("needs wp-async: Linux 6.7 or newer")
		}
		r.read(0, 0, 64)
		r.store(4000, 1)
		if err := r.m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		large := func() int {
			if r.m.frames == nil {
				return 0
			}
			if err := r.m.refreshFrames(); err != nil {
				t.Fatal(err)
			}
			return r.m.frames.Census().Large()
		}
		before := large()
		r.save("snap", SaveOptions{})
		if after := large(); after < before {
			t.Errorf("%d frames are large after a save that met no writes, %d were before", after, before)
		}
		written := r.m.mem.NewPageSet()
		if err := r.watch.Tracker.Collect(r.m.mem.Regions()[0].Range, written, memory.Peek); err != nil {
			t.Fatal(err)
		}
		if !written.Has(r.buffer(4000, 1).Start) {
			t.Error("a page without a name is armed after the save")
		}
		if on {
			if n := r.m.naming.Table().At(r.buffer(0, 1).Start.GFN()); n.Kind() != names.Block || !n.Proven() || written.Has(r.buffer(0, 1).Start) {
				t.Errorf("page 0 is %s, proven %t, counts as written: %t", n, n.Proven(), written.Has(r.buffer(0, 1).Start))
			}
		}
		if err := r.m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
