package disk

import (
	"errors"
	"fmt"
	"io"
	"sync"

	"golang.org/x/sys/unix"
)

// errShort is a disk that ended before its size.
var errShort = fmt.Errorf("disk is shorter than when it was opened: %w", io.ErrUnexpectedEOF)

// poolThreads is how many requests of one queue wait for the disk at once
// when there is no io_uring. Disks gain little beyond; each may be an OS
// thread.
const poolThreads = 16

// pool does I/O with goroutines that wait. It implements [Queue].
type pool struct {
	image *Raw
	event int
	fds   []int

	work    chan poolOp
	threads int
	busy    int // requests in flight; the owner's
	done    sync.WaitGroup

	mu       sync.Mutex
	finished []completion // guarded by mu
	taken    []completion // the owner's, being returned
}

type poolOp struct {
	token int
	run   func() error
}

// newPool makes a pool over r, which may be nil for an engine. Its goroutines start when they are needed.
func newPool(r *Raw, depth int) (*pool, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("eventfd: %w", err)
	}
	return &pool{
		image: r, event: event, fds: []int{event},
		work: make(chan poolOp, depth),
	}, nil
}

// FDs implements [Queue].
func (p *pool) FDs() []int { return p.fds }

// Read implements [Queue].
func (p *pool) Read(token int, bufs [][]byte, offset int64) {
	p.read(p.image, token, bufs, offset)
}

// Write implements [Queue].
func (p *pool) Write(token int, bufs [][]byte, offset int64, sync bool) {
	p.write(p.image, token, bufs, offset, sync)
}

// Flush implements [Queue].
func (p *pool) Flush(token int) { p.flush(p.image, token) }

// read implements [engine].
func (p *pool) read(r *Raw, token int, bufs [][]byte, offset int64) {
	p.start(token, func() error { return r.ReadAtv(bufs, offset) })
}

// write implements [engine].
func (p *pool) write(r *Raw, token int, bufs [][]byte, offset int64, sync bool) {
	p.start(token, func() error { return r.writeAtv(bufs, offset, sync) })
}

// flush implements [engine].
func (p *pool) flush(r *Raw, token int) { p.start(token, r.Flush) }

// Discard implements [Queue].
func (p *pool) Discard(token int, offset, n int64) {
	p.start(token, func() error { return p.image.Discard(offset, n) })
}

// WriteZeroes implements [Queue].
func (p *pool) WriteZeroes(token int, offset, n int64, unmap bool) {
	p.start(token, func() error { return p.image.WriteZeroes(offset, n, unmap) })
}

// start hands a request to a goroutine, a new one if all are busy and there
// may be more. The channel has room for every token, so this never waits.
func (p *pool) start(token int, run func() error) {
	p.busy++
	if p.busy > p.threads && p.threads < poolThreads {
		p.threads++
		p.done.Add(1)
		go p.serve()
	}
	p.work <- poolOp{token, run}
}

func (p *pool) serve() {
	defer p.done.Done()
	for op := range p.work {
		p.finish(completion{op.token, op.run()})
	}
}

func (p *pool) finish(c completion) {
	p.mu.Lock()
	p.finished = append(p.finished, c)
	p.mu.Unlock()
	one := [8]byte{1}
	for {
		// A full counter is as good as a signal.
		if _, err := unix.Write(p.event, one[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// Submit implements [Queue]; requests start at once.
func (p *pool) Submit() {}

// Completed implements [Queue].
func (p *pool) Completed() (token int, err error, ok bool) {
	if p.busy == 0 {
		return 0, nil, false
	}
	if len(p.taken) == 0 {
		p.mu.Lock()
		p.finished, p.taken = p.taken, p.finished
		p.mu.Unlock()
		if len(p.taken) == 0 {
			return 0, nil, false
		}
	}
	last := len(p.taken) - 1
	c := p.taken[last]
	p.taken = p.taken[:last]
	p.busy--
	return c.token, c.err, true
}

// Wait implements [Queue].
func (p *pool) Wait() { p.wait() }

// wait returns when a request of the pool has finished or one of others is
// ready.
func (p *pool) wait(others ...unix.PollFd) {
	var count [8]byte
	// Empty or interrupted, the counter is looked at again below.
	_, _ = unix.Read(p.event, count[:])
	p.mu.Lock()
	ready := len(p.finished)+len(p.taken) > 0
	p.mu.Unlock()
	if ready {
		return
	}
	_, _ = unix.Poll(append(others, unix.PollFd{Fd: int32(p.event), Events: unix.POLLIN}), -1)
}

// Close implements [Queue].
func (p *pool) Close() error {
	close(p.work)
	p.done.Wait()
	if err := unix.Close(p.event); err != nil {
		return fmt.Errorf("close eventfd: %w", err)
	}
	return nil
}
