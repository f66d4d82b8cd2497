package net

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// receiver gives frames from the backend to the driver. It owns the receive and
// control queues and, while it runs, the device's filter and offloads.
type receiver struct {
	run            *run
	queue, control *virtio.Queue
	worker         *virtio.Worker
	held           buffers
	limit          int  // longest frame and its header, bytes
	starved        bool // the driver has given no buffers
	watched        bool // the backend's descriptor is watched
	dead           bool // the backend has ended

	// bounce takes a frame when the driver's buffers may be too short for
	// it; the first pending bytes wait for buffers.
	bounce  [][]byte
	pending int

	chain   virtio.Chain // of the control queue
	command [maxControl]byte
}

// errReceive is wrapped when a chain is against virtio 1.2 5.1.6.3.
var errReceive = errors.New("malformed receive buffer")

// outcome is what became of looking for one frame.
type outcome int

const (
	progress outcome = iota // there may be more at once
	nothing                 // the backend has no frame
	starved                 // the driver has no buffer
	ended                   // the backend has ended
)

func (r *receiver) init(run *run) error {
	worker, err := virtio.NewWorker(r.drain)
	if err != nil {
		return err
	}
	r.run, r.worker = run, worker
	r.queue, r.control = run.Queues[receiveQueue], run.Queues[controlQueue]
	r.bounce = [][]byte{make([]byte, HeaderSize+MaxFrame)}
	if r.queue != nil {
		r.held.init(r.queue, run.Has(featureMergeBuffers), run.NeedsReset)
	}
	r.setLimit()
	if err := r.watch(); err != nil {
		worker.Stop()
		return err
	}
	return nil
}

func (r *receiver) watch() error {
	if err := r.worker.AddQueue(r.queue, r.serve); err != nil {
		return err
	}
	if err := r.worker.AddQueue(r.control, r.serveControl); err != nil {
		return err
	}
	fd := r.run.backend.FD()
	if fd < 0 || r.queue == nil {
		return nil
	}
	r.watched = true
	return r.worker.AddFD(fd, unix.EPOLLIN, r.readable)
}

// setLimit follows the offloads in effect.
func (r *receiver) setLimit() {
	mtu := r.run.device.config.MTU
	if mtu == 0 {
		mtu = defaultMTU
	}
	r.limit = HeaderSize + maxOverhead + mtu
	if r.run.device.offloads&guestSegments != 0 {
		r.limit = HeaderSize + MaxFrame
	}
}

// readable is called when the backend has frames, or has ended: errors and
// hang-ups are reported always.
func (r *receiver) readable(events uint32) {
	failed := events&(unix.EPOLLHUP|unix.EPOLLERR) != 0
	if failed && r.starved {
		// What is left is read when there are buffers again.
		r.watched = false
		_ = r.worker.RemoveFD(r.run.backend.FD()) // it is watched
		return
	}
	if r.serve(); failed && !r.starved && !r.dead {
		r.end(fmt.Errorf("poll events %#x", events))
	}
}

// serve receives what is waiting.
func (r *receiver) serve() {
	if r.dead {
		return
	}
	for n := range virtio.Budget {
		if n%publishEvery == 0 {
			r.queue.Publish()
		}
		result, err := r.one()
		if result == progress {
			continue
		}
		r.queue.Publish()
		if result == ended {
			r.end(err)
		} else {
			r.setStarved(result == starved)
		}
		return
	}
	r.queue.Publish()
	r.queue.Again()
}

// one receives one frame.
func (r *receiver) one() (outcome, error) {
	if r.pending > 0 {
		return r.deliverPending(), nil
	}
	to, enough := r.held.fetch(r.limit)
	if len(to) == 0 {
		return starved, nil // the driver will kick
	}
	if !enough {
		to = r.bounce
	}
	n, err := r.run.backend.Receive(to)
	if again(err) {
		return nothing, nil
	}
	if err != nil {
		return ended, err
	}
	wanted := r.wanted(to, n)
	switch {
	case enough && wanted:
		r.held.commit(n)
		r.count(n)
	case wanted:
		r.pending = n
		return r.deliverPending(), nil
	case enough:
		r.held.touched(n) // unused, but not as they were
		fallthrough
	default:
		r.run.device.counters.receiveDropped.Add(1)
	}
	return progress, nil
}

// wanted reports whether the driver wants the frame of n bytes, its header
// included, at the start of the buffers.
func (r *receiver) wanted(at [][]byte, n int) bool {
	if n < HeaderSize+ethernetSize {
		return false
	}
	d := r.run.device
	var start [HeaderSize + filterBytes]byte
	gather(start[:], at)
	return d.LinkUp() &&
		acceptable(start[headerFlags], start[headerGSOType], d.offloads) &&
		d.filter.pass((*[filterBytes]byte)(start[HeaderSize:]), d.MAC())
}

// gather copies the start of the buffers to p.
func gather(p []byte, from [][]byte) {
	for _, b := range from {
		if p = p[copy(p, b):]; len(p) == 0 {
			return
		}
	}
}

// deliverPending copies the frame that waits to the driver's buffers, or drops
// it when the driver has given all it has and that is too short.
func (r *receiver) deliverPending() outcome {
	switch r.held.copyIn(r.bounce[0][:r.pending]) {
	case copyWait:
		return starved
	case copyNever:
		r.run.device.counters.receiveDropped.Add(1)
	case copyDone:
		r.count(r.pending)
	}
	r.pending = 0
	return progress
}

func (r *receiver) count(n int) {
	c := &r.run.device.counters
	c.receivedFrames.Add(1)
	c.receivedBytes.Add(uint64(n - HeaderSize))
}

// setStarved stops or starts listening to the backend: it is readable all the
// time that the driver has no buffers.
func (r *receiver) setStarved(starved bool) {
	if r.starved == starved {
		return
	}
	r.starved = starved
	if !r.watched {
		return
	}
	events := uint32(unix.EPOLLIN)
	if starved {
		events = 0
	}
	if err := r.worker.SetEvents(r.run.backend.FD(), events); err != nil {
		r.end(err)
	}
}

// end forgets the backend.
func (r *receiver) end(err error) {
	r.dead = true
	r.run.gone(r.worker, err)
}

// drain gives the held buffers back to the ring before a pause or the end.
func (r *receiver) drain() {
	if r.queue != nil {
		r.held.release()
		r.queue.Publish()
	}
}
