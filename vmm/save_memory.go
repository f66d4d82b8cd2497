package vmm

import (
	"context"
	"runtime"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// How memory is saved while the guest writes it. Every step is right for the one
// reason that it comes after the one before:
//
//	arm all of memory        what is written from now on is reported
//	prove, name all pages    names are about bytes that are armed
//	follow the names         what dies from now on is told
//	look which are proven    and only these are taken of disks that are written
//	store the rest           bytes are read after they were armed
//	collect, store           again and again: collected pages are armed anew
//	                         before their bytes are read
//	pause, collect           nothing runs: what is reported now is all there is
//
// So a page that no collection reports, and whose name did not die, equals in the
// pause what it is named after: it holds the bytes that it was compared by, and
// its block cannot have changed, since the table would have dropped the name
// before, which Follow tells. Names of immutable layers need no table: their
// files are looked at once more in the pause. All else is stored as it is when
// it is reported for the last time. In between nobody else may arm, which would
// forget writes: see [copying].

// When rounds end: what is left then is stored in the pause.
const (
	fewPages   = 256 // 1 MiB
	mostRounds = 8
	// lastRounds follow after what was stored has been made durable, which takes
	// its time.
	lastRounds = 4
)

// liveWorkers is how many cores work while the guest runs, which keeps half.
func liveWorkers() int { return max(1, runtime.NumCPU()/2) }

// storeMemory names and stores memory, and then what is written meanwhile, until
// little is left. Without a tracker all is left.
func (s *saving) storeMemory(ctx context.Context) error {
	m := s.m
	s.dirty, s.lost = m.mem.NewPageSet(), m.mem.NewPageSet()
	if m.restored != nil {
		// What it came from knows best what it equals.
		m.restored.teach(ctx)
	}
	if m.tracker.Kind() == memory.TrackerNone {
		return s.flushDisks()
	}
	if err := s.arm(); err != nil {
		return err
	}
	all, err := s.nameMemory(ctx)
	if err != nil {
		return err
	}
	if err := s.w.AddMap(ctx, all, s.doubtful(all)); err != nil {
		return err
	}
	s.mapped = true
	if err := s.rounds(ctx, mostRounds); err != nil {
		return err
	}
	if err := s.w.Sync(); err != nil {
		return err
	}
	if err := s.flushDisks(); err != nil {
		return err
	}
	return s.rounds(ctx, lastRounds)
}

// nameMemory makes the map of all pages. What can be proven of disks that are
// written is proven before it, and what it found by their indexes after it.
func (s *saving) nameMemory(ctx context.Context) (*names.Map, error) {
	m := s.m
	size := m.mem.Size()
	if err := s.prove(ctx); err != nil {
		return nil, err
	}
	all, err := m.namePages(ctx, false, func(done, _ uint64) { s.tell(SaveMemory, done/2, size) })
	if err != nil || m.naming == nil {
		return all, err
	}
	m.naming.Table().Follow(s.lost)
	return all, s.prove(ctx)
}

// prove proves names. A disk that cannot be read proves none, which costs room
// and no more.
func (s *saving) prove(ctx context.Context) error {
	if s.m.naming == nil {
		return nil
	}
	if err := s.m.naming.Prove(ctx, liveWorkers()); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		s.m.log.Warn("a disk cannot be read to compare memory with it", "err", err)
	}
	return nil
}

// doubtful returns the pages that the map names after disks that are written and
// whose names the table does not vouch for. Preconditions: names are followed.
func (s *saving) doubtful(all *names.Map) *memory.PageSet {
	doubt := s.m.mem.NewPageSet()
	if s.m.naming == nil {
		return doubt
	}
	table := s.m.naming.Table()
	layers := table.Layers()
	for r := range all.Runs() {
		if r.Name.Kind() != names.Block || layers[r.Name.Layer()].Immutable {
			continue
		}
		for i := range r.Pages {
			gfn := r.Start + memory.GFN(i)
			if table.At(gfn) != names.OfBlock(r.Name.Layer(), r.Name.Number()+i).AsProven() {
				doubt.Add(gfn.GPA(), memory.PageSize)
			}
		}
	}
	return doubt
}

// stored hears from the writer how much of what it was given is stored.
func (s *saving) stored(done, total uint64) {
	if s.mapped || !s.armed {
		return // rounds are not foreseen
	}
	size := s.m.mem.Size()
	s.tell(SaveMemory, size/2+uint64(float64(size-size/2)*float64(done)/float64(max(total, 1))), size)
}

// rounds collects and stores what was written, until little was or it does not
// get less, and at most so many times.
func (s *saving) rounds(ctx context.Context, most int) error {
	last := ^uint64(0)
	for range most {
		if err := s.m.collect(s.dirty, memory.Rearm); err != nil {
			return err
		}
		s.takeLost()
		if err := s.w.AddPages(ctx, s.dirty); err != nil {
			return err
		}
		n := s.dirty.Count()
		s.dirty.Clear()
		s.report.Rounds++
		s.expected = n
		if n <= fewPages || n > last/4*3 {
			return nil
		}
		last = n
	}
	return nil
}

// takeLost adds the pages whose names have died. One that dies again meanwhile
// is not asked for its name any more.
func (s *saving) takeLost() {
	for r := range s.lost.Runs() {
		s.dirty.Add(r.Start, r.Size)
		s.lost.Remove(r.Start, r.Size)
	}
}

// flushDisks makes the disks stable, so that freezing them takes no time.
func (s *saving) flushDisks() error {
	for _, t := range s.tops {
		if err := t.disk.image.Flush(); err != nil {
			return err
		}
	}
	return nil
}
