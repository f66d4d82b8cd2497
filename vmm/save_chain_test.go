package vmm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

// memoryOf verifies a snapshot and reads all of its memory, which is there until
// the end of the test.
func (r *saveRig) memoryOf(name string) (*snapshot.Manifest, *memory.Space) {
	r.t.Helper()
	s, err := snapshot.Open(filepath.Join(r.dir, name), snapshot.OpenOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	space, err := memory.New(memory.Config{Size: s.Manifest().Memory.Size, HugePages: memory.HugePagesOff})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() { space.Close() })
	ctx := r.t.Context()
	err = errors.Join(s.Verify(ctx, snapshot.LoadOptions{}), s.Load(ctx, space, snapshot.LoadOptions{}))
	r.t.Logf("%s: %d files are open", name, countFDs(r.t))
	if err := errors.Join(err, s.Close()); err != nil {
		r.t.Error(err)
	}
	return s.Manifest(), space
}

// TestSaveChain: snapshots of a running guest that each add to the one before are,
// in the end, what a full snapshot of the same moment is, page by page. Each of
// them is what memory was, and none can be removed from below another.
func TestSaveChain(t *testing.T) {
	links := labtest.Count(6, 20)
	r := newSaveRig(t, "memwriter:size=24M,words=300,order=hot,rate=5000,seed=5", nil)
	r.readAll()
	rng := rand.New(rand.NewPCG(1, 20))
	name := func(i int) string { return fmt.Sprintf("link%d", i) }
	parent := ""
	var was [][32]byte
	for i := range links {
		for range 30 {
			r.mix(rng)
		}
		r.runs()
		o := SaveOptions{Parent: parent, Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd}[i/2%2]}
		if i == links-1 {
			// The last two are of one moment.
			if err := r.m.Pause(deadline(t)); err != nil {
				t.Fatal(err)
			}
			r.save("full", SaveOptions{})
		}
		r.save(name(i), o)
		was, parent = append(was, digestSpace(t, r.watch.takeDump(t))), name(i)
	}

	last, chained := r.memoryOf(name(links - 1))
	full, whole := r.memoryOf("full")
	if d := last.Depth(); d != links-1 {
		t.Errorf("the last has %d ancestors", d)
	}
	for what, space := range map[string]*memory.Space{"the full snapshot": whole, "the paused machine": r.m.mem} {
		if differ := differing(t, chained, space); len(differ) > 0 {
			t.Errorf("%d pages differ between the chain and %s, the first %s", len(differ), what, differ[0])
		}
	}
	if last.Holds.Parent == 0 || last.Holds.Unique >= full.Holds.Unique {
		t.Errorf("the last link holds %+v, the full one %+v", last.Holds, full.Holds)
	}
	for i := range links {
		if i < links-1 {
			if _, space := r.memoryOf(name(i)); digestSpace(t, space) != was[i] {
				t.Errorf("link %d is not what memory was", i)
			}
		}
		dir := filepath.Join(r.dir, name(i))
		if err := snapshot.Remove(dir); (i < links-1) != errors.Is(err, snapshot.ErrDependents) {
			t.Errorf("link %d is removed: %v", i, err)
		}
		if _, err := os.Stat(dir); (i < links-1) != (err == nil) {
			t.Errorf("link %d after its removal: %v", i, err)
		}
	}

	// The last was removed, so the one before it ends the chain.
	end := filepath.Join(r.dir, name(links-2))
	m := restoreFrom(t, end, SnapshotOptions{Config: restoredConfig(t, end)})
	if digestSpace(t, m.mem) != was[links-2] {
		t.Error("restored lazily from the chain, memory is another")
	}
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	finishWriter(t, m)
	if !t.Failed() {
		labtest.Proof(t, "snapshot-chain", "%d incremental snapshots of a running guest, the last beside a full one of the same moment: of %d pages none differs; %d MiB unique in the last, %d MiB in the full one; each link is intact and what memory was, and none but the last can be removed",
			links, chained.Size()/memory.PageSize, last.Holds.Unique>>20, full.Holds.Unique>>20)
	}
}
