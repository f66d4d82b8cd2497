package disk

import (
	"time"

	"golang.org/x/sys/unix"
)

// Queue does I/O on an image without waiting for it. It belongs to one
// goroutine: a device worker that submits in batches and waits for the
// descriptors of FDs among its own.
//
// Every request carries a token below the depth, which is in use until
// Completed returns it. The buffers belong to the queue for as long.
//
//	Read, Write, ... -> Submit -> (FDs readable) -> Completed until none
type Queue interface {
	// FDs become readable, once for each change, when requests complete.
	// They are for epoll with EPOLLET and need not be read.
	FDs() []int
	// Read fills bufs from offset.
	Read(token int, bufs [][]byte, offset int64)
	// Write writes bufs at offset; with sync it completes when stable. The
	// cache mode does not matter here: a guest may change its mind about it.
	Write(token int, bufs [][]byte, offset int64, sync bool)
	// Flush makes stable what completed before.
	Flush(token int)
	// Discard and WriteZeroes are as in [Image].
	Discard(token int, offset, n int64)
	WriteZeroes(token int, offset, n int64, unmap bool)
	// Submit starts what was asked for. Some may complete at once.
	Submit()
	// Completed returns a request that completed, if there is one.
	Completed() (token int, err error, ok bool)
	// Wait returns when Completed may have one; something is in flight.
	Wait()
	// Close ends the queue. Nothing may be in flight.
	Close() error
}

// NewQueue makes a queue for up to depth requests in flight, with io_uring
// where the kernel allows it and threads where not. Make it before the process
// gives up the right to: later it needs io_uring_enter at most.
func (r *Raw) NewQueue(depth int) (Queue, error) {
	return newEngine(r, depth)
}

// Writes that go to the page cache are done at once: copying is cheaper than
// handing over to a kernel thread, which is what io_uring does for buffered
// writes on most file systems. When the kernel makes the writer wait (too many
// dirty pages), the next ones are handed over, so that reads do not wait too.
const (
	inlineLimit   = 256 << 10            // bytes of one write
	slowWrite     = 2 * time.Millisecond // a write this long was made to wait
	slowWritesOff = 64                   // writes that are then handed over
)

// ringQueue reads, flushes and writes by io_uring, and leaves what is rare to
// the threads of a pool.
type ringQueue struct {
	raw    *Raw
	ring   *ring
	pool   *pool
	ops    []ringOp
	fds    []int
	inline []completion // done while being asked for, not yet returned
	next   int          // first of inline not returned
	slow   int          // writes left to hand over
	iov    []unix.Iovec // for inline writes
}

// ringOp is a request on the ring.
type ringOp struct {
	raw    *Raw
	kind   opKind
	sync   bool
	bufs   [][]byte
	offset int64
	left   int          // bytes to go
	iov    []unix.Iovec // what the kernel was given
}

type opKind uint8

const (
	opRead opKind = iota
	opWrite
	opFlush
)

type completion struct {
	token int
	err   error
}

// FDs implements [Queue].
func (q *ringQueue) FDs() []int { return q.fds }

// Read implements [Queue].
func (q *ringQueue) Read(token int, bufs [][]byte, offset int64) { q.read(q.raw, token, bufs, offset) }

// read implements [engine].
func (q *ringQueue) read(r *Raw, token int, bufs [][]byte, offset int64) {
	if r.misaligned(bufs) {
		q.pool.read(r, token, bufs, offset)
		return
	}
	q.begin(r, token, opRead, bufs, offset, false)
}

// Write implements [Queue].
func (q *ringQueue) Write(token int, bufs [][]byte, offset int64, sync bool) {
	q.write(q.raw, token, bufs, offset, sync)
}

// write implements [engine].
func (q *ringQueue) write(r *Raw, token int, bufs [][]byte, offset int64, sync bool) {
	if r.misaligned(bufs) {
		q.pool.write(r, token, bufs, offset, sync)
		return
	}
	if !sync && r.options.Cache != CacheNone && length(bufs) <= inlineLimit {
		if q.slow == 0 {
			q.writeNow(r, token, bufs, offset)
			return
		}
		q.slow--
	}
	q.begin(r, token, opWrite, bufs, offset, sync)
}

// writeNow writes to the page cache, here.
func (q *ringQueue) writeNow(r *Raw, token int, bufs [][]byte, offset int64) {
	begin := time.Now()
	q.iov = appendIovecs(q.iov[:0], bufs, 0)
	n, errno := pwritev(r.fd, q.iov, offset)
	if time.Since(begin) > slowWrite {
		q.slow = slowWritesOff
	}
	if errno != 0 || n != length(bufs) {
		// A short write, or a failure to look at: the long way does both.
		q.begin(r, token, opWrite, bufs, offset, false)
		return
	}
	q.inline = append(q.inline, completion{token: token})
}

// Flush implements [Queue].
func (q *ringQueue) Flush(token int) { q.flush(q.raw, token) }

// flush implements [engine].
func (q *ringQueue) flush(r *Raw, token int) { q.begin(r, token, opFlush, nil, 0, false) }

// start implements [engine].
func (q *ringQueue) start(token int, run func() error) { q.pool.start(token, run) }

// Discard implements [Queue].
func (q *ringQueue) Discard(token int, offset, n int64) { q.pool.Discard(token, offset, n) }

// WriteZeroes implements [Queue].
func (q *ringQueue) WriteZeroes(token int, offset, n int64, unmap bool) {
	q.pool.WriteZeroes(token, offset, n, unmap)
}

// begin puts a request on the ring.
func (q *ringQueue) begin(r *Raw, token int, kind opKind, bufs [][]byte, offset int64, sync bool) {
	op := &q.ops[token]
	op.raw, op.kind, op.sync, op.bufs, op.offset, op.left = r, kind, sync, bufs, offset, length(bufs)
	op.iov = appendIovecs(op.iov[:0], bufs, 0)
	q.enqueue(token)
}

// enqueue puts what is left of a request on the ring.
func (q *ringQueue) enqueue(token int) {
	op := &q.ops[token]
	flags := uint32(0)
	if op.sync {
		flags = unix.RWF_DSYNC
	}
	switch op.kind {
	case opRead:
		q.ring.readv(op.raw.fd, uint64(token), op.iov, op.offset)
	case opWrite:
		q.ring.writev(op.raw.fd, uint64(token), op.iov, op.offset, flags)
	case opFlush:
		q.ring.fdatasync(op.raw.fd, uint64(token))
	}
}

// Submit implements [Queue].
func (q *ringQueue) Submit() { q.ring.submit(q.refused) }

// refused completes a request that the kernel did not take.
func (q *ringQueue) refused(token uint64, errno unix.Errno) {
	op := &q.ops[token]
	err := error(errno)
	if op.kind == opFlush {
		err = op.raw.flushed(errno)
	}
	q.inline = append(q.inline, completion{token: int(token), err: err})
}

// Completed implements [Queue].
func (q *ringQueue) Completed() (token int, err error, ok bool) {
	for {
		if q.next < len(q.inline) {
			c := q.inline[q.next]
			if q.next++; q.next == len(q.inline) {
				q.inline, q.next = q.inline[:0], 0
			}
			return c.token, c.err, true
		}
		data, res, ok := q.ring.completed()
		if !ok {
			return q.pool.Completed()
		}
		token := int(data)
		if done, err := q.finish(token, res); done {
			return token, err, true
		}
	}
}

// finish looks at the result of a request. One that was interrupted or done
// in part goes on.
func (q *ringQueue) finish(token int, res int32) (done bool, err error) {
	op := &q.ops[token]
	switch errno := unix.Errno(-res); {
	case res < 0 && (errno == unix.EINTR || errno == unix.EAGAIN):
		q.enqueue(token)
		q.Submit()
		return false, nil
	case op.kind == opFlush && res < 0:
		return true, op.raw.flushed(errno)
	case op.kind == opFlush:
		return true, op.raw.flushed(nil)
	case res < 0:
		return true, errno
	case int(res) == op.left:
		return true, nil
	case op.kind == opRead && op.raw.endsBefore(op.offset+int64(res), op.left-int(res)):
		zeroAfter(op.bufs, length(op.bufs)-op.left+int(res))
		return true, nil
	case op.kind == opRead && op.raw.options.Container:
		// The file has grown since: again, from where O_DIRECT can go on.
		res = int32(op.raw.wholeBlocks(int(res)))
	case res == 0:
		return true, errShort
	}
	op.left -= int(res)
	op.offset += int64(res)
	op.iov = appendIovecs(op.iov[:0], op.bufs, length(op.bufs)-op.left)
	q.enqueue(token)
	q.Submit()
	return false, nil
}

// Wait implements [Queue].
func (q *ringQueue) Wait() {
	if q.next == len(q.inline) {
		q.pool.wait(unix.PollFd{Fd: int32(q.ring.fd), Events: unix.POLLIN})
	}
}

// Close implements [Queue].
func (q *ringQueue) Close() error {
	err := q.ring.close()
	if perr := q.pool.Close(); err == nil {
		err = perr
	}
	return err
}

// appendIovecs describes bufs to the kernel, without the first skip bytes.
func appendIovecs(iov []unix.Iovec, bufs [][]byte, skip int) []unix.Iovec {
	for _, b := range bufs {
		if skip >= len(b) {
			skip -= len(b)
			continue
		}
		v := unix.Iovec{Base: &b[skip]}
		v.SetLen(len(b) - skip)
		iov = append(iov, v)
		skip = 0
	}
	return iov
}
