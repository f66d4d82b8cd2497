package vmm

import (
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/images/chain"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// drawnState is a state of a machine and how it is saved and restored, all of it
// drawn by lot.
type drawnState struct {
	guest       string
	names       bool
	tracker     memory.TrackerKind
	disks       int  // that are written
	readOnly    bool // there is one more
	overlay     bool // the first is an overlay already
	steps       int
	parent      bool
	compression snapshot.Compression
	how         string // live, paused (by the save), still (before it), stop
	mode        RestoreMode
}

func drawState(rng *rand.Rand) drawnState {
	return drawnState{
		guest: fmt.Sprintf("memwriter:size=%dM,words=%d,order=%s,seed=%d", 1+rng.IntN(32),
			[]int{1, 8, 300, 512}[rng.IntN(4)], []string{"sequential", "random", "hot"}[rng.IntN(3)], rng.Uint32()),
		names:       rng.IntN(3) > 0,
		tracker:     []memory.TrackerKind{memory.TrackerAuto, memory.TrackerAuto, memory.TrackerKVMLog, memory.TrackerNone}[rng.IntN(4)],
		disks:       1 + rng.IntN(2),
		readOnly:    rng.IntN(3) == 0,
		overlay:     rng.IntN(2) == 0,
		steps:       20 + rng.IntN(200),
		parent:      rng.IntN(2) == 0,
		compression: []snapshot.Compression{snapshot.None, snapshot.Zstd}[rng.IntN(2)],
		how:         []string{"live", "paused", "still", "stop"}[rng.IntN(4)],
		mode:        []RestoreMode{RestoreLazy, RestoreEager, RestorePrefetch}[rng.IntN(3)],
	}
}

func (s drawnState) String() string {
	return fmt.Sprintf("names=%t,%s,disks=%d,parent=%t,%s,%s,%s", s.names, s.tracker, s.disks, s.parent, s.compression, s.how, s.mode)
}

// configure makes the machine's disks.
func (s drawnState) configure(t *testing.T, c *config.Config) {
	t.Helper()
	c.Memory.Names, c.Memory.Tracker = config.OnOff(s.names), s.tracker
	first := c.Disks[0].Path
	content, err := os.ReadFile(first)
	if err != nil {
		t.Fatal(err)
	}
	disk := func(name string, readOnly bool) {
		path := filepath.Join(filepath.Dir(first), name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		c.Disks = append(c.Disks, config.Disk{Path: path, ReadOnly: readOnly})
	}
	if s.overlay {
		top := filepath.Join(filepath.Dir(first), "over.qcow2")
		if err := chain.CreateOverlay(top, first, chain.Raw, namesDisk); err != nil {
			t.Fatal(err)
		}
		c.Disks[0].Path = top
	}
	for i := 1; i < s.disks; i++ {
		disk(fmt.Sprintf("disk%d.img", i), false)
	}
	if s.readOnly {
		disk("readonly.img", true)
	}
}

// mix changes memory as host and devices do, in one of many ways, beside the
// guest that writes its own.
func (r *saveRig) mix(rng *rand.Rand) {
	r.t.Helper()
	const pages = (saveRAM - int(namesBuffers)) / memory.PageSize
	n := 1 + rng.IntN(64)
	row := r.buffer(rng.IntN(pages-n), n)
	n = min(n, namesDisk/memory.PageSize)
	disk, block := rng.IntN(len(r.drivers)), int64(rng.IntN(namesDisk/memory.PageSize-n))*memory.PageSize
	var err error
	switch rng.IntN(8) {
	case 0: // zeros
		err = r.m.mem.WriteAt(make([]byte, row.Size), row.Start)
	case 1: // bytes of its own
		b := make([]byte, row.Size)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		err = r.m.mem.WriteAt(b, row.Start)
	case 2: // duplicates of other pages
		b := make([]byte, row.Size)
		if err = r.m.mem.ReadAt(b, r.buffer(rng.IntN(pages-n), n).Start); err == nil {
			err = r.m.mem.WriteAt(b, row.Start)
		}
	case 3: // given back, as a balloon does
		err = r.m.mem.Discard(row.Start, row.Size)
	case 4: // a single byte
		err = r.m.mem.WriteAt([]byte{byte(rng.Uint32())}, row.Start+memory.GPA(rng.Uint64N(row.Size)))
	case 5: // written to a disk
		r.requestOf(disk, 1, block, row)
		return
	default: // read from one
		r.requestOf(disk, 0, block, row)
		return
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.m.mem.Wrote(row.Start, row.Size)
}

func (r *saveRig) requestOf(disk int, kind uint32, offset int64, buffer memory.Range) {
	r.t.Helper()
	if err := r.ioOf(disk, kind, offset, buffer); err != nil {
		r.t.Fatal(err)
	}
}

// saveState saves the machine as the state says, and returns the digest of what
// memory was in the pause.
func (r *saveRig) saveState(s drawnState, name, parent string) [32]byte {
	r.t.Helper()
	var was [32]byte
	still := s.how == "still"
	if still {
		if err := r.m.Pause(deadline(r.t)); err != nil {
			r.t.Fatal(err)
		}
		was = digestSpace(r.t, r.m.mem)
	}
	r.save(name, SaveOptions{Parent: parent, Compression: s.compression, Stop: s.how == "stop", Paused: s.how == "paused"})
	if still {
		if now := digestSpace(r.t, r.m.mem); now != was {
			r.t.Error("a save of a paused machine changed its memory")
		}
		return was
	}
	if s.tracker == memory.TrackerNone {
		// Nobody collects: the machine had to be paused for good.
		r.t.Fatal("what memory was is not known")
	}
	return digestSpace(r.t, r.watch.takeDump(r.t))
}

// restoreState restores the machine and returns it, paused. What is to be
// prefetched is recorded by another restore before.
func (s drawnState) restoreState(t *testing.T, dir string) *VM {
	t.Helper()
	if s.mode == RestorePrefetch {
		set, err := snapshot.CreateWorkingSet(dir)
		if err != nil || set == nil {
			t.Fatal(set, err)
		}
		m := restoreFrom(t, dir, SnapshotOptions{Config: restoredConfig(t, dir), WorkingSet: set})
		if err := m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		runUntil(t, m, 100)
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return restoreFrom(t, dir, SnapshotOptions{Config: restoredConfig(t, dir), Mode: s.mode})
}

// TestSaveStates: memory of a restored machine is what it was in the pause of the
// save, in states and modes drawn by lot, and the guest finds all that it wrote.
func TestSaveStates(t *testing.T) {
	states := labtest.Count(6, 100)
	seen, modes := map[[32]byte]bool{}, map[string]int{}
	var held snapshot.Holds
	for i := range states {
		rng := rand.New(rand.NewPCG(uint64(i), 11))
		s := drawState(rng)
		if s.tracker == memory.TrackerNone {
			s.how = "still"
		}
		t.Run(fmt.Sprintf("%d,%s", i, s), func(t *testing.T) {
			r := newSaveRig(t, s.guest, func(c *config.Config) { s.configure(t, c) })
			for range s.steps {
				r.mix(rng)
			}
			parent := ""
			if s.parent {
				parent = "parent"
				r.save(parent, SaveOptions{Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd}[rng.IntN(2)]})
				r.watch.dump, r.watch.n = nil, 0
				for range s.steps / 2 {
					r.mix(rng)
				}
				r.runs()
			}
			was := r.saveState(s, "snap", parent)
			if seen[was] {
				t.Error("two states are the same")
			}
			seen[was] = true
			h := r.open("snap").Manifest().Holds
			held.Zero, held.Blocks, held.Duplicate = held.Zero+h.Zero, held.Blocks+h.Blocks, held.Duplicate+h.Duplicate
			held.Parent, held.Unique = held.Parent+h.Parent, held.Unique+h.Unique

			m := s.restoreState(t, filepath.Join(r.dir, "snap"))
			if now := digestSpace(t, m.mem); now != was {
				t.Errorf("memory has the digest %x after the restore, it had %x", now, was)
			}
			if err := m.Resume(deadline(t)); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 500)
			finishWriter(t, m)
			for _, mode := range strings.Split(s.String(), ",") {
				modes[mode]++
			}
		})
	}
	if held.Zero == 0 || held.Blocks == 0 || held.Duplicate == 0 || held.Unique == 0 {
		t.Errorf("the snapshots hold %+v", held)
	}
	t.Log(modes)
	if !t.Failed() {
		labtest.Proof(t, "snapshot-states", "%d states drawn by lot, %d with names and %d without, %d on a parent, %d compressed, %d of a machine that ran on, %d lazy, %d eager, %d prefetched: %d MiB zero, %d named by blocks, %d duplicate, %d as the parent, %d unique; after the restore every digest of all memory was what it was in the pause",
			states, modes["names=true"], modes["names=false"], modes["parent=true"], modes["zstd"], states-modes["stop"], modes["lazy"], modes["eager"], modes["prefetch"],
			held.Zero>>20, held.Blocks>>20, held.Duplicate>>20, held.Parent>>20, held.Unique>>20)
	}
}
