package blk

import (
	"errors"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// queue is one virtqueue at work. Everything in it belongs to its worker.
type queue struct {
	d          *Device
	io         IOQueue
	slots      []slot
	free       []int // tokens of unused slots
	activation virtio.Activation
	geometry   geometry
	ring       *virtio.Queue
	worker     *virtio.Worker
}

// slot is a request in flight; its index is the token of the IOQueue. Its
// slices are kept for the next request.
type slot struct {
	chain  virtio.Chain
	req    request
	io     IO
	bufs   [][]byte
	stable bool // flush after it, before it completes
}

func newQueue(d *Device, io IOQueue) *queue {
	size := d.config.QueueSize
	q := &queue{d: d, io: io, slots: make([]slot, size)}
	for i := size - 1; i >= 0; i-- {
		q.free = append(q.free, i)
	}
	return q
}

// start runs the worker, unless the driver has not enabled the queue.
func (q *queue) start(a virtio.Activation, ring *virtio.Queue) error {
	if ring == nil {
		return nil
	}
	q.activation, q.ring = a, ring
	q.geometry = geometry{
		size: q.d.size.Load(), blockSize: int64(q.d.config.BlockSize), readOnly: q.d.config.ReadOnly,
		features: a.Features, maxErase: maxEraseSectors,
	}
	w, err := virtio.NewWorker(q.drain)
	if err != nil {
		return err
	}
	err = w.AddQueue(ring, q.serve)
	for _, fd := range q.io.FDs() {
		err = errors.Join(err, w.AddFD(fd, unix.EPOLLIN|unix.EPOLLET, func(uint32) { q.serve() }))
	}
	if err != nil {
		w.Stop()
		return err
	}
	q.worker = w
	w.Start()
	return nil
}

func (q *queue) stop() {
	if q.worker != nil {
		q.worker.Stop()
	}
	q.worker = nil
}

func (q *queue) pause() {
	if q.worker != nil {
		q.worker.Pause()
	}
}

func (q *queue) resume() {
	if q.worker != nil {
		q.worker.Resume()
	}
}

// maxRounds is how long one call of serve works before the worker looks at
// what else it is asked for, such as a pause.
const maxRounds = 64

// serve takes every request that waits, starts them together, and gives back
// what has completed, until there is neither. The driver hears once a round.
func (q *queue) serve() {
	for range maxRounds {
		began := q.begin()
		if began {
			q.io.Submit()
		}
		ended := q.complete()
		if !began && !ended {
			return
		}
		q.ring.Publish()
		q.d.stats.rounds.Add(1)
	}
	q.ring.Kick()
}

// begin starts the requests that wait and reports whether there were any.
func (q *queue) begin() bool {
	began := false
	for len(q.free) > 0 {
		token := q.free[len(q.free)-1]
		s := &q.slots[token]
		if !q.ring.Pop(&s.chain) {
			break
		}
		q.free = q.free[:len(q.free)-1]
		q.dispatch(token, s)
		began = true
	}
	return began
}

// complete gives finished requests back, unpublished, and reports whether
// there were any.
func (q *queue) complete() bool {
	ended := false
	for {
		token, err, ok := q.io.Completed()
		if !ok {
			return ended
		}
		q.finishIO(token, err)
		ended = true
	}
}

// drain waits for what is in flight and gives it back, and begins nothing new.
func (q *queue) drain() {
	for {
		q.complete()
		if len(q.free) == len(q.slots) {
			break
		}
		q.io.Wait()
	}
	q.ring.Publish()
}

// dispatch starts a request, or answers it when there is nothing to wait for.
func (q *queue) dispatch(token int, s *slot) {
	var head [headerSize + segmentSize]byte
	n := s.chain.ReadAt(head[:], 0)
	r, status, err := parse(head[:n], s.chain.ReadableBytes, s.chain.WritableBytes, &q.geometry)
	s.req = r
	switch {
	case err != nil:
		q.ring.Fail(err)
		q.release(token, 0)
	case status != statusOK:
		q.answer(token, status, 0)
	case r.kind == typeGetID:
		q.answerID(token)
	case r.kind == typeIn && r.length == 0, r.kind == typeOut && r.length == 0:
		q.answer(token, statusOK, 0)
	default:
		q.startIO(token, s)
	}
}

// startIO hands the request to the I/O queue.
func (q *queue) startIO(token int, s *slot) {
	observer := q.d.config.Observer
	stable := !q.d.writeback.Load()
	s.stable = stable && (s.req.kind == typeDiscard || s.req.kind == typeWriteZeroes)
	switch r := &s.req; r.kind {
	case typeIn:
		s.gather(s.chain.Writable, 0)
		if observer != nil {
			observer.BeforeRead(&s.io)
		}
		q.io.Read(token, s.bufs, r.offset)
	case typeOut:
		s.gather(s.chain.Readable, headerSize)
		if observer != nil {
			observer.BeforeWrite(&s.io)
		}
		q.io.Write(token, s.bufs, r.offset, stable)
	case typeFlush:
		q.io.Flush(token)
	case typeDiscard:
		if observer != nil {
			observer.BeforeErase(r.offset, r.length)
		}
		q.io.Discard(token, r.offset, r.length)
	case typeWriteZeroes:
		if observer != nil {
			observer.BeforeErase(r.offset, r.length)
		}
		q.io.WriteZeroes(token, r.offset, r.length, r.unmap)
	}
}

// gather lists the memory of a read's or write's data: length bytes of
// buffers, without the first skip.
func (s *slot) gather(buffers []virtio.Buffer, skip int) {
	s.bufs, s.io.Buffers = s.bufs[:0], s.io.Buffers[:0]
	s.io.Offset = s.req.offset
	left := int(s.req.length)
	for _, b := range buffers {
		if skip >= len(b.Data) {
			skip -= len(b.Data)
			continue
		}
		b = b.Slice(skip, min(len(b.Data), skip+left))
		skip = 0
		if left -= len(b.Data); len(b.Data) > 0 {
			s.bufs = append(s.bufs, b.Data)
			s.io.Buffers = append(s.io.Buffers, b)
		}
	}
}

// finishIO answers a request that the disk has done.
func (q *queue) finishIO(token int, err error) {
	s := &q.slots[token]
	r, observer := s.req, q.d.config.Observer
	if s.stable && err == nil {
		s.stable = false
		q.io.Flush(token)
		q.io.Submit()
		return
	}
	written := uint64(0)
	if r.kind == typeIn {
		// Even a failed read may have changed memory.
		written = uint64(r.length)
		s.chain.Wrote(written)
	}
	if observer != nil {
		switch r.kind {
		case typeIn:
			observer.AfterRead(&s.io, err)
		case typeOut:
			observer.AfterWrite(&s.io, err)
		case typeDiscard, typeWriteZeroes:
			observer.AfterErase(r.offset, r.length, err)
		}
	}
	status := byte(statusOK)
	if err != nil {
		status = statusIOError
		q.d.failed(q, r, err)
	} else {
		q.d.stats.count(r)
	}
	q.answer(token, status, written)
}

// answerID writes the serial number, padded with zeros.
func (q *queue) answerID(token int) {
	s := &q.slots[token]
	var id [serialSize]byte
	copy(id[:], q.d.config.Serial)
	q.answer(token, statusOK, uint64(s.chain.WriteAt(id[:s.req.length], 0)))
}

// answer writes the status, which is the last writable byte, and gives the
// chain back. written counts the bytes before it.
func (q *queue) answer(token int, status byte, written uint64) {
	s := &q.slots[token]
	last := s.chain.WritableBytes - statusSize
	s.chain.WriteAt([]byte{status}, last)
	if written == last {
		written++
	}
	q.release(token, uint32(written))
}

// release gives a chain back and frees its slot.
func (q *queue) release(token int, written uint32) {
	q.ring.Push(q.slots[token].chain.Head, written)
	q.free = append(q.free, token)
}
