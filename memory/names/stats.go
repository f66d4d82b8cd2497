package names

import "sync/atomic"

// Stats counts what a [Table] did, in pages, since it was made.
type Stats struct {
	// Recorded names, all of them provisional at first.
	Recorded uint64
	// Missed could have been named, but other I/O overlapped, the page stood
	// twice in a request, the request failed, or the chain was full.
	Missed uint64
	// Names dropped, by cause: I/O into or out of the page, the block was
	// written, the block was erased, the VMM wrote or discarded the page, the
	// tracker reported the page, the layer was cut short.
	DroppedIO, DroppedWrite, DroppedErase, DroppedHost, DroppedWritten, DroppedResize uint64
	// Proven counts successful proofs, Refuted those that found other bytes
	// (the name is dropped), Demoted proven names that became provisional
	// because their frame was armed anew.
	Proven, Refuted, Demoted uint64

	// Named pages now, and how many of them are proven.
	Named, NamedProven uint64
}

// counters are the counts of [Stats] while they change.
type counters struct {
	recorded, missed                                                   atomic.Uint64
	droppedIO, droppedWrite, droppedErase, droppedHost, droppedWritten atomic.Uint64
	droppedResize, proven, refuted, demoted                            atomic.Uint64
}

// Stats returns the counts. They are not of one moment.
func (t *Table) Stats() Stats {
	c := &t.stats
	s := Stats{
		Recorded: c.recorded.Load(), Missed: c.missed.Load(),
		DroppedIO: c.droppedIO.Load(), DroppedWrite: c.droppedWrite.Load(), DroppedErase: c.droppedErase.Load(),
		DroppedHost: c.droppedHost.Load(), DroppedWritten: c.droppedWritten.Load(), DroppedResize: c.droppedResize.Load(),
		Proven: c.proven.Load(), Refuted: c.refuted.Load(), Demoted: c.demoted.Load(),
	}
	for i := range t.frames {
		f := t.count(i)
		s.Named += uint64(f.used())
		s.NamedProven += uint64(f.vouched())
	}
	return s
}

// add counts n, sparing the cache line when there is nothing to count.
func add(c *atomic.Uint64, n uint64) {
	if n > 0 {
		c.Add(n)
	}
}
