package blk

import "sync/atomic"

// Stats counts what a disk has done since it was made.
type Stats struct {
	Reads, Writes, Flushes, Erases uint64 // requests completed
	ReadBytes, WriteBytes          uint64
	Errors                         uint64 // requests answered with an error of the disk
	Rounds                         uint64 // times that a worker took or gave back requests
}

type counters struct {
	reads, writes, flushes, erases atomic.Uint64
	readBytes, writeBytes          atomic.Uint64
	errors                         atomic.Uint64
	rounds                         atomic.Uint64
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	c := &d.stats
	return Stats{
		Reads: c.reads.Load(), Writes: c.writes.Load(), Flushes: c.flushes.Load(), Erases: c.erases.Load(),
		ReadBytes: c.readBytes.Load(), WriteBytes: c.writeBytes.Load(),
		Errors: c.errors.Load(), Rounds: c.rounds.Load(),
	}
}

// count adds a completed request.
func (c *counters) count(r request) {
	switch r.kind {
	case typeIn:
		c.reads.Add(1)
		c.readBytes.Add(uint64(r.length))
	case typeOut:
		c.writes.Add(1)
		c.writeBytes.Add(uint64(r.length))
	case typeFlush:
		c.flushes.Add(1)
	case typeDiscard, typeWriteZeroes:
		c.erases.Add(1)
	}
}
