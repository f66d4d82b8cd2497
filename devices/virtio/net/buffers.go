package net

import (
	"encoding/binary"
	"fmt"

	"ditto.vm/devices/virtio"
)

// buffers are the driver's receive buffers that are held for the next frame, in
// ring order. With mergeable buffers (virtio 1.2 5.1.6.3.1) a frame takes as
// many as it needs; without, it takes one.
type buffers struct {
	queue  *virtio.Queue
	merge  bool
	failed func(error) // is told what the driver did wrong

	chains []virtio.Chain // a ring as long as the queue
	first  int            // oldest held
	count  int
	bytes  uint64 // in all held

	to    [][]byte // the held buffers' memory, from the oldest on
	room  uint64   // bytes in to
	stale bool     // to is to be made anew

	broken bool // the driver gave a chain that is none

	number [2]byte
}

func (b *buffers) init(q *virtio.Queue, merge bool, failed func(error)) {
	*b = buffers{
		queue: q, merge: merge, failed: failed,
		chains: make([]virtio.Chain, q.Size()),
		to:     make([][]byte, 0, maxVector),
	}
}

// at returns the i-th held chain.
func (b *buffers) at(i int) *virtio.Chain { return &b.chains[(b.first+i)%len(b.chains)] }

// pop takes one more chain from the driver and reports whether there was one.
// After a chain that no frame can start in, none is taken until a reset.
func (b *buffers) pop() bool {
	c := b.at(b.count)
	if b.broken || b.count == len(b.chains) || !b.queue.Pop(c) {
		return false
	}
	if len(c.Readable) > 0 || c.WritableBytes < HeaderSize {
		b.broken = true
		b.queue.Rewind(1)
		b.failed(fmt.Errorf("%w: %d readable buffers, %d writable bytes", errReceive, len(c.Readable), c.WritableBytes))
		return false
	}
	b.count++
	b.bytes += c.WritableBytes
	b.stale = true
	return true
}

// fetch holds buffers for a frame of up to limit bytes, its header included,
// and returns their memory: nothing when the driver has given none, and enough
// is false when they are too short for the longest frame.
func (b *buffers) fetch(limit int) (to [][]byte, enough bool) {
	for (b.count == 0 || b.merge && b.bytes < uint64(limit)) && b.pop() {
	}
	if b.stale {
		b.collect(uint64(limit))
	}
	return b.to, b.room >= uint64(limit)
}

// collect lists the memory of the held buffers until there are limit bytes, or
// as many pieces as one system call takes.
func (b *buffers) collect(limit uint64) {
	b.to, b.room, b.stale = b.to[:0], 0, false
	for i := range b.usable() {
		for _, piece := range b.at(i).Writable {
			if b.room >= limit || len(b.to) == maxVector {
				return
			}
			b.to = append(b.to, piece.Data)
			b.room += uint64(len(piece.Data))
		}
	}
}

// usable is how many held chains one frame may take.
func (b *buffers) usable() int {
	if b.merge {
		return b.count
	}
	return min(b.count, 1)
}

// commit gives the driver the frame of n bytes that stands at the start of the
// held buffers.
func (b *buffers) commit(n int) {
	b.setNumber(n)
	b.touched(n)
	for left := uint64(n); left > 0; {
		c := b.at(0)
		k := min(left, c.WritableBytes)
		b.queue.Push(c.Head, uint32(k))
		left -= k
		b.bytes -= c.WritableBytes
		b.first = (b.first + 1) % len(b.chains)
		b.count--
	}
	b.stale = true
}

// setNumber completes the frame's header with the number of buffers it takes,
// which is 1 without mergeable buffers.
func (b *buffers) setNumber(n int) {
	number, room := 0, uint64(0)
	for room < uint64(n) {
		room += b.at(number).WritableBytes
		number++
	}
	binary.LittleEndian.PutUint16(b.number[:], uint16(number))
	b.at(0).WriteAt(b.number[:], headerNumBuffers)
}

// touched reports that the first n bytes of the held buffers were written.
func (b *buffers) touched(n int) {
	for i, left := 0, uint64(n); left > 0; i++ {
		c := b.at(i)
		k := min(left, c.WritableBytes)
		c.Wrote(k)
		left -= k
	}
}

// What copyIn did.
type copied int

const (
	copyDone  copied = iota
	copyWait         // the driver has to give more buffers
	copyNever        // the driver's buffers are too short
)

// copyIn gives the driver a frame from elsewhere.
func (b *buffers) copyIn(frame []byte) copied {
	n := uint64(len(frame))
	for (b.count == 0 || b.merge && b.bytes < n) && b.pop() {
	}
	switch {
	case b.count == 0:
		return copyWait
	case !b.merge && b.at(0).WritableBytes < n:
		return copyNever
	case b.bytes < n && b.count == b.queue.Size():
		return copyNever
	case b.bytes < n:
		return copyWait
	}
	rest := frame
	for i := 0; len(rest) > 0; i++ {
		for _, piece := range b.at(i).Writable {
			rest = rest[copy(piece.Data, rest):]
		}
	}
	b.commit(len(frame))
	return copyDone
}

// release un-takes what is held.
func (b *buffers) release() {
	b.queue.Rewind(b.count)
	b.count, b.bytes, b.room, b.stale = 0, 0, 0, true
}
