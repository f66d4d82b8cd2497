package namestest_test

import (
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio/blk"
)

// gates is an I/O queue of a disk whose requests can be held: before they reach
// the disk, and after. Its methods are called by the device's worker.
type gates struct {
	blk.IOQueue // the disk's
	event       int
	// arrived hears of each request when the device asks for it, and may hold it.
	arrived func(*passage)
	atDisk  map[int]*passage // by token

	mu    sync.Mutex // guards what follows
	moved []*passage // that may go to the disk
	ended []*passage // that may be reported
}

// passage is a request on its way.
type passage struct {
	gates *gates
	token int
	run   func()
	// hold keeps it back until move and end are called.
	hold bool
	err  error // what it is reported with
	done chan struct{}
}

func newGates(t testing.TB, disk blk.IOQueue, arrived func(*passage)) *gates {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	return &gates{IOQueue: disk, event: event, arrived: arrived, atDisk: map[int]*passage{}}
}

// move lets the request go to the disk. Its channel done is closed when the
// disk has done it.
func (p *passage) move() {
	p.gates.wake(func(g *gates) { g.moved = append(g.moved, p) })
}

// end lets the device hear that the request is done. It is done, or never moved.
func (p *passage) end() {
	p.gates.wake(func(g *gates) { g.ended = append(g.ended, p) })
}

// wake changes the lists and lets the worker look at them.
func (g *gates) wake(change func(*gates)) {
	g.mu.Lock()
	change(g)
	g.mu.Unlock()
	one := [8]byte{1}
	_, _ = unix.Write(g.event, one[:])
}

func (g *gates) ask(token int, run func()) {
	p := &passage{gates: g, token: token, run: run, done: make(chan struct{})}
	g.arrived(p)
	if !p.hold {
		g.start(p)
	}
}

func (g *gates) start(p *passage) {
	g.atDisk[p.token] = p
	p.run()
}

// FDs implements blk.IOQueue.
func (g *gates) FDs() []int { return append(g.IOQueue.FDs(), g.event) }

// Read implements blk.IOQueue.
func (g *gates) Read(token int, bufs [][]byte, offset int64) {
	g.ask(token, func() { g.IOQueue.Read(token, bufs, offset) })
}

// Write implements blk.IOQueue.
func (g *gates) Write(token int, bufs [][]byte, offset int64, sync bool) {
	g.ask(token, func() { g.IOQueue.Write(token, bufs, offset, sync) })
}

// Flush implements blk.IOQueue.
func (g *gates) Flush(token int) { g.ask(token, func() { g.IOQueue.Flush(token) }) }

// Discard implements blk.IOQueue.
func (g *gates) Discard(token int, offset, n int64) {
	g.ask(token, func() { g.IOQueue.Discard(token, offset, n) })
}

// WriteZeroes implements blk.IOQueue.
func (g *gates) WriteZeroes(token int, offset, n int64, unmap bool) {
	g.ask(token, func() { g.IOQueue.WriteZeroes(token, offset, n, unmap) })
}

// Completed implements blk.IOQueue.
func (g *gates) Completed() (int, error, bool) {
	g.mu.Lock()
	moved := g.moved
	g.moved = nil
	g.mu.Unlock()
	for _, p := range moved {
		g.start(p)
	}
	if len(moved) > 0 {
		g.IOQueue.Submit()
	}
	for {
		token, err, ok := g.IOQueue.Completed()
		if !ok {
			break
		}
		p := g.atDisk[token]
		delete(g.atDisk, token)
		p.err = err
		close(p.done)
		if !p.hold {
			return token, err, true
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if len(g.ended) == 0 {
		return 0, nil, false
	}
	p := g.ended[0]
	g.ended = g.ended[1:]
	return p.token, p.err, true
}

// Wait implements blk.IOQueue: something may have changed.
func (g *gates) Wait() {
	const patience = 5 // milliseconds
	fds := []unix.PollFd{{Fd: int32(g.event), Events: unix.POLLIN}}
	for _, fd := range g.IOQueue.FDs() {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	_, _ = unix.Poll(fds, patience)
}

// Close implements blk.IOQueue.
func (g *gates) Close() error {
	if err := unix.Close(g.event); err != nil {
		return err
	}
	return g.IOQueue.Close()
}
