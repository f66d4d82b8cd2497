package namestest_test

import (
	"encoding/binary"
	"time"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

const (
	queueSize = 64
	// depth is how many requests a queue's driver has in flight, of up to
	// maxSegments buffers besides header and status.
	depth       = 4
	maxSegments = 4
)

// Request types and sizes (virtio 1.2 5.2.6).
const (
	kindRead        = 0
	kindWrite       = 1
	kindDiscard     = 11
	kindWriteZeroes = 13

	headerBytes = 16
	segmentSize = 16
	sectorSize  = 512
	slotBytes   = 64 // header, segment, status
	statusAt    = headerBytes + segmentSize
)

// request is one of the driver's, inside or outside the disk.
type request struct {
	kind   uint32
	offset int64
	mem    []memory.Range // of a read or write
	n      int64          // bytes of a discard or write-zeroes
}

// queue is one virtqueue of the driver, for one goroutine.
type queue struct {
	*virtiotest.Queue
	driver *virtiotest.Driver
	index  int
	slots  memory.GPA // depth headers
	heads  [depth]int // of what is in flight, plus 1
	failed uint64     // requests that the device refused
}

func newQueue(d *virtiotest.Driver, index int) *queue {
	return &queue{Queue: d.Queue(index), driver: d, index: index, slots: d.Alloc(depth*slotBytes, page)}
}

// submit puts a request on the ring, into a slot that is free.
func (q *queue) submit(slot int, r request) {
	t, mem := q.driver.TB, q.driver.Machine.Memory
	t.Helper()
	at := q.slots + memory.GPA(slot*slotBytes)
	var b [slotBytes]byte
	binary.LittleEndian.PutUint32(b[:], r.kind)
	binary.LittleEndian.PutUint64(b[8:], uint64(r.offset/sectorSize))
	binary.LittleEndian.PutUint64(b[headerBytes:], uint64(r.offset/sectorSize))
	binary.LittleEndian.PutUint32(b[headerBytes+8:], uint32(r.n/sectorSize))
	b[statusAt] = 0xff
	check(t, mem.WriteAt(b[:], at))
	head := virtiotest.Segment{GPA: at, Len: headerBytes}
	if r.kind == kindDiscard || r.kind == kindWriteZeroes {
		head.Len += segmentSize
	}
	segments := []virtiotest.Segment{head}
	for _, m := range r.mem {
		segments = append(segments, virtiotest.Segment{GPA: m.Start, Len: int(m.Size), Write: r.kind == kindRead})
	}
	segments = append(segments, virtiotest.Segment{GPA: at + statusAt, Len: 1, Write: true})
	q.heads[slot] = int(q.Add(false, segments...)) + 1
	q.Kick()
}

// free returns a slot whose request is done, or -1.
func (q *queue) free() int {
	q.Reap()
	for slot, head := range q.heads {
		if head == 0 {
			return slot
		}
		if q.Done(uint16(head - 1)) {
			q.finish(slot)
			return slot
		}
	}
	return -1
}

// finish takes note of a request that is done.
func (q *queue) finish(slot int) {
	t := q.driver.TB
	t.Helper()
	status, err := q.driver.Machine.Memory.View(q.slots+memory.GPA(slot*slotBytes+statusAt), 1)
	check(t, err)
	switch status[0] {
	case 0:
	case 1:
		q.failed++
	default:
		t.Errorf("queue %d: status %d", q.index, status[0])
	}
	q.heads[slot] = 0
}

// wait waits until the device has done something.
func (q *queue) wait() {
	if q.Reap() > 0 {
		return
	}
	timer := time.NewTimer(virtiotest.Patience)
	defer timer.Stop()
	select {
	case <-q.driver.Machine.MSIs.Arrived(q.driver.Message(q.index)):
	case <-timer.C:
		q.driver.TB.Errorf("queue %d: nothing happens", q.index)
	}
}

// drain waits for everything in flight.
func (q *queue) drain() {
	for slot := range q.heads {
		for head := q.heads[slot]; head != 0; head = q.heads[slot] {
			if q.Reap(); q.Done(uint16(head - 1)) {
				q.finish(slot)
				break
			}
			q.wait()
			if q.driver.TB.Failed() {
				return
			}
		}
	}
}
