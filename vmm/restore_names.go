package vmm

import (
	"context"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
)

// namedLayer is a layer that pages of a snapshot are named by: its owner, the
// snapshot or an ancestor, and its number there.
type namedLayer struct {
	owner *snapshot.Snapshot
	layer int
}

// fileID tells files apart, whatever they are called.
type fileID struct{ device, inode uint64 }

// matchLayers finds out which layers of the machine's disks are those that the
// snapshot names pages by: the same files. The VM is made and has its rights yet.
func (r *restored) matchLayers() {
	if r.vm.naming == nil {
		return
	}
	known := map[fileID]names.LayerID{}
	for i, l := range r.vm.naming.Table().Layers() {
		var st unix.Stat_t
		if err := unix.Stat(l.Title, &st); err != nil {
			continue
		}
		if id := (fileID{st.Dev, st.Ino}); l.Immutable {
			if _, ok := known[id]; !ok {
				known[id] = names.LayerID(i)
			}
		}
	}
	r.layers = map[namedLayer]names.LayerID{}
	unmatched := map[namedLayer]bool{}
	r.snapshot.EachBlock(func(run snapshot.Run, of *snapshot.Snapshot) bool {
		key := namedLayer{of, run.Layer}
		if _, ok := r.layers[key]; ok || unmatched[key] {
			return true
		}
		stamp, err := of.LayerStamp(run.Layer)
		if id, ok := known[fileID{stamp.Device, stamp.Inode}]; ok && err == nil {
			r.layers[key] = id
			r.vm.naming.Identify(id, of.Manifest().Layers[run.Layer].ID)
		} else {
			unmatched[key] = true
		}
		return true
	})
}

// teachAtOnce is after how many runs of blocks teaching looks whether it is to
// stop.
const teachAtOnce = 256

// teach records in the table of names which pages equal blocks, as far as no name
// stands there yet, and reports whether all is recorded. These are hints, as those
// of I/O are: what the guest has written meanwhile will not be proven.
func (r *restored) teach(ctx context.Context) bool {
	r.teaching.Lock()
	defer r.teaching.Unlock()
	if r.vm.naming == nil || r.done.Load() {
		return true
	}
	table, n := r.vm.naming.Table(), 0
	r.snapshot.EachBlock(func(run snapshot.Run, of *snapshot.Snapshot) bool {
		if n++; n <= r.taught {
			return true
		}
		if n%teachAtOnce == 0 && ctx.Err() != nil {
			return false
		}
		r.taught = n
		if id, ok := r.layers[namedLayer{of, run.Layer}]; ok {
			for i := range run.Pages {
				gfn := run.Start + memory.GFN(i)
				if table.At(gfn) == 0 {
					table.Record(gfn.GPA(), names.OfBlock(id, run.Number+i))
				}
			}
		}
		return true
	})
	return ctx.Err() == nil
}
