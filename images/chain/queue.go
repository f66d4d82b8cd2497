package chain

import (
	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// Bounds of one queue.
const (
	// maxPieces is how many places of the files one request may touch and
	// still be done without a thread.
	maxPieces = 16
	// morePieces is how many requests on parts are in flight beside those on
	// one piece, per token.
	morePieces = 2
)

// queue does I/O on a chain without waiting. What is mapped goes straight to
// the files; what needs metadata from a file, decompression or allocation is
// left to threads. It implements [disk.Queue].
type queue struct {
	c       *Chain
	engine  *disk.Engine
	ops     []op
	parents []int // of the engine's tokens above those of ops
	free    []int // of these tokens
	done    []completion
	next    int // first of done that was not returned
	pieces  []piece
}

// op is a request in flight.
type op struct {
	left  int // pieces
	err   error
	image *qcow2.File // whose clusters are pinned; nil for none
	pin   qcow2.Pin
}

type completion struct {
	token int
	err   error
}

// piece is a part of a request that is in one place.
type piece struct {
	file *disk.Raw // nil for zeros
	host int64
	n    int64
}

// NewQueue makes a queue for up to depth requests in flight. Make it before
// the process gives up the right to.
func (c *Chain) NewQueue(depth int) (disk.Queue, error) {
	parts := morePieces * depth
	engine, err := disk.NewEngine(depth + parts)
	if err != nil {
		return nil, err
	}
	q := &queue{c: c, engine: engine, ops: make([]op, depth), parents: make([]int, parts)}
	for i := range parts {
		q.free = append(q.free, depth+i)
	}
	return q, nil
}

// FDs implements [disk.Queue].
func (q *queue) FDs() []int { return q.engine.FDs() }

// Read implements [disk.Queue].
func (q *queue) Read(token int, bufs [][]byte, offset int64) {
	top := q.c.top()
	if top.image == nil {
		q.ops[token] = op{left: 1}
		q.engine.Read(top.file, token, bufs, offset)
		return
	}
	pin := top.image.Begin()
	if !q.plan(top, offset, size(bufs), false) {
		top.image.End(pin)
		q.do(token, func() error { return top.ReadAtv(bufs, offset) })
		return
	}
	q.transfer(token, bufs, op{image: top.image, pin: pin}, func(token int, bufs [][]byte, p piece) {
		q.engine.Read(p.file, token, bufs, p.host)
	})
}

// Write implements [disk.Queue].
func (q *queue) Write(token int, bufs [][]byte, offset int64, sync bool) {
	top := q.c.top()
	switch {
	case q.c.disguises(bufs, offset):
		q.done = append(q.done, completion{token, errDisguise})
		return
	case top.image == nil:
		q.ops[token] = op{left: 1}
		q.engine.Write(top.file, token, bufs, offset, sync)
		return
	}
	pin := top.image.Begin()
	// Clean is asked after the look-up: then what was found is stable.
	if !q.plan(top, offset, size(bufs), true) || sync && !top.image.Clean() {
		top.image.End(pin)
		q.do(token, func() error { return top.writeAtv(bufs, offset, sync) })
		return
	}
	q.transfer(token, bufs, op{image: top.image, pin: pin}, func(token int, bufs [][]byte, p piece) {
		q.engine.Write(p.file, token, bufs, p.host, sync)
	})
}

// plan splits a request into pieces. It returns false when that cannot be done
// here and now.
func (q *queue) plan(top *Layer, offset, n int64, write bool) bool {
	q.pieces = q.pieces[:0]
	for n > 0 {
		if len(q.pieces) == maxPieces || offset < 0 || offset > top.Size()-n {
			return false
		}
		e, ok, _ := top.search(offset, n, false)
		if !ok || e.Kind == qcow2.Compressed || write && (e.Kind != qcow2.Data || !e.inPlace || top.image.ReadOnly()) {
			return false
		}
		p := piece{host: e.Host, n: e.Length}
		if e.Kind == qcow2.Data {
			p.file = e.Layer.file
		}
		q.pieces = append(q.pieces, p)
		offset, n = offset+e.Length, n-e.Length
	}
	return len(q.pieces) <= 1 || len(q.pieces) <= len(q.free)
}

// transfer starts the pieces of a request.
func (q *queue) transfer(token int, bufs [][]byte, o op, start func(token int, bufs [][]byte, p piece)) {
	if len(q.pieces) == 1 && q.pieces[0].file != nil {
		o.left = 1
		q.ops[token] = o
		start(token, bufs, q.pieces[0])
		return
	}
	for _, p := range q.pieces {
		if p.file != nil {
			o.left++
		}
	}
	q.ops[token] = o
	for _, p := range q.pieces {
		part, rest := cut(bufs, p.n)
		bufs = rest
		if p.file == nil {
			for _, b := range part {
				clear(b)
			}
			continue
		}
		last := len(q.free) - 1
		sub := q.free[last]
		q.free = q.free[:last]
		q.parents[sub-len(q.ops)] = token
		start(sub, part, p)
	}
	if o.left == 0 {
		o.image.End(o.pin)
		q.done = append(q.done, completion{token: token})
	}
}

// cut splits bufs after n bytes, and does not change them.
func cut(bufs [][]byte, n int64) (first, rest [][]byte) {
	for i, b := range bufs {
		if int64(len(b)) > n {
			if n > 0 {
				first = append(first, b[:n])
			}
			return first, append([][]byte{b[n:]}, bufs[i+1:]...)
		}
		first = append(first, b)
		n -= int64(len(b))
	}
	return first, nil
}

func size(bufs [][]byte) (n int64) {
	for _, b := range bufs {
		n += int64(len(b))
	}
	return n
}

// do leaves a request to a thread.
func (q *queue) do(token int, run func() error) {
	q.ops[token] = op{left: 1}
	q.engine.Do(token, run)
}

// Flush implements [disk.Queue].
func (q *queue) Flush(token int) {
	top := q.c.top()
	if top.image == nil || top.image.Clean() {
		q.ops[token] = op{left: 1}
		q.engine.Flush(top.file, token)
		return
	}
	q.do(token, top.image.Flush)
}

// Discard implements [disk.Queue].
func (q *queue) Discard(token int, offset, n int64) {
	top := q.c.top()
	q.do(token, func() error { return top.discard(offset, n) })
}

// WriteZeroes implements [disk.Queue].
func (q *queue) WriteZeroes(token int, offset, n int64, unmap bool) {
	top := q.c.top()
	q.do(token, func() error { return top.writeZeroes(offset, n, unmap) })
}

// Submit implements [disk.Queue].
func (q *queue) Submit() { q.engine.Submit() }

// Completed implements [disk.Queue].
func (q *queue) Completed() (token int, err error, ok bool) {
	if q.next < len(q.done) {
		c := q.done[q.next]
		if q.next++; q.next == len(q.done) {
			q.done, q.next = q.done[:0], 0
		}
		return c.token, c.err, true
	}
	for {
		token, err, ok := q.engine.Completed()
		if !ok {
			return 0, nil, false
		}
		if token >= len(q.ops) {
			q.free = append(q.free, token)
			token = q.parents[token-len(q.ops)]
		}
		o := &q.ops[token]
		if err != nil {
			o.err = err
		}
		if o.left--; o.left > 0 {
			continue
		}
		if o.image != nil {
			o.image.End(o.pin)
			o.image = nil
		}
		return token, o.err, true
	}
}

// Wait implements [disk.Queue].
func (q *queue) Wait() {
	if q.next == len(q.done) {
		q.engine.Wait()
	}
}

// Close implements [disk.Queue].
func (q *queue) Close() error { return q.engine.Close() }
