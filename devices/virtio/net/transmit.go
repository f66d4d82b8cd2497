package net

import (
	"errors"
	"fmt"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// transmitter takes frames from the driver to the backend.
type transmitter struct {
	run      *run
	queue    *virtio.Queue
	worker   *virtio.Worker
	announce atomic.Bool // send a RARP frame first

	blocked bool // the backend waits for its descriptor
	dead    bool // the backend has ended
	chain   virtio.Chain
	header  [HeaderSize]byte
	from    [][]byte
}

// errTransmit is wrapped when a chain is against virtio 1.2 5.1.6.2.
var errTransmit = errors.New("malformed frame to send")

func (t *transmitter) init(r *run) error {
	worker, err := virtio.NewWorker(nil)
	if err != nil {
		return err
	}
	t.run, t.queue, t.worker = r, r.Queues[transmitQueue], worker
	t.from = make([][]byte, 0, maxVector)
	if err := worker.AddQueue(t.queue, t.serve); err != nil {
		worker.Stop()
		return err
	}
	if fd := r.backend.FD(); fd >= 0 {
		if err := worker.AddFD(fd, 0, t.writable); err != nil {
			worker.Stop()
			return err
		}
	}
	return nil
}

// writable is called when the backend may go on, or has ended: errors and
// hang-ups are reported always.
func (t *transmitter) writable(events uint32) {
	if events&(unix.EPOLLHUP|unix.EPOLLERR) != 0 {
		t.end(fmt.Errorf("poll events %#x", events))
	}
	if t.blocked {
		t.setBlocked(false)
	}
	t.serve()
}

// serve sends what is waiting. Having sent something it looks once more later,
// before it asks for a kick: a driver that sends on meanwhile is spared a VM exit
// for every frame.
func (t *transmitter) serve() {
	if t.queue == nil || t.blocked {
		return
	}
	if t.announce.Swap(false) {
		t.sendAnnouncement()
	}
	for n := range virtio.Budget {
		if n%publishEvery == 0 {
			t.queue.Publish()
		}
		if n > 0 && !t.queue.Waiting() {
			break
		}
		if !t.queue.Pop(&t.chain) {
			t.finish(t.flush())
			return
		}
		if err := t.send(&t.chain); again(err) {
			t.queue.Rewind(1)
			t.finish(err)
			return
		}
		t.queue.Push(t.chain.Head, 0)
	}
	t.finish(t.flush())
	t.queue.Again()
}

// finish publishes what was sent, and waits for the descriptor when the
// backend asked for that.
func (t *transmitter) finish(err error) {
	t.queue.Publish()
	if again(err) {
		t.setBlocked(true)
	}
}

// flush sends what the backend has gathered.
func (t *transmitter) flush() error {
	if t.dead {
		return nil
	}
	err := t.run.backend.Flush()
	if err != nil && !again(err) {
		t.end(err)
		return nil
	}
	return err
}

// send takes one frame to the backend. The only error is that it was not taken
// yet; a frame that cannot be sent is dropped and counted.
func (t *transmitter) send(c *virtio.Chain) error {
	if c.ReadableBytes < HeaderSize || len(c.Writable) > 0 {
		t.run.NeedsReset(fmt.Errorf("%w: %d bytes, %d writable buffers", errTransmit, c.ReadableBytes, len(c.Writable)))
		return nil
	}
	counters := &t.run.device.counters
	size := c.ReadableBytes - HeaderSize
	if size < ethernetSize || size > MaxFrame || t.dead || !t.run.device.LinkUp() {
		counters.sendDropped.Add(1)
		return nil
	}
	c.ReadAt(t.header[:], 0)
	if ParseHeader(&t.header).Check(t.run.Features, int(size)) != nil {
		counters.sendDropped.Add(1)
		return nil
	}
	t.from = append(t.from[:0], t.header[:])
	t.from = appendFrom(t.from, c.Readable, HeaderSize)
	err := t.run.backend.Send(t.from)
	switch {
	case err == nil:
		counters.sentFrames.Add(1)
		counters.sentBytes.Add(size)
	case again(err):
		return err
	case errors.Is(err, ErrDropped):
		counters.sendDropped.Add(1)
	default:
		counters.sendDropped.Add(1)
		t.end(err)
	}
	return nil
}

// appendFrom appends the buffers without their first skip bytes.
func appendFrom(to [][]byte, buffers []virtio.Buffer, skip int) [][]byte {
	for _, b := range buffers {
		if skip >= len(b.Data) {
			skip -= len(b.Data)
			continue
		}
		to = append(to, b.Data[skip:])
		skip = 0
	}
	return to
}

func (t *transmitter) end(err error) {
	if t.dead {
		return
	}
	t.dead, t.blocked = true, false
	t.run.gone(t.worker, err)
}

func (t *transmitter) setBlocked(blocked bool) {
	if t.dead {
		return
	}
	events := uint32(0)
	if blocked {
		events = unix.EPOLLOUT
	}
	if err := t.worker.SetEvents(t.run.backend.FD(), events); err != nil {
		t.end(err)
		return
	}
	t.blocked = blocked
}

// sendAnnouncement sends a RARP frame in the guest's name (RFC 903): bridges
// on the way learn where it is. Nobody answers it.
func (t *transmitter) sendAnnouncement() {
	if t.dead {
		return
	}
	mac := t.run.device.MAC()
	frame := rarp(mac)
	t.header = [HeaderSize]byte{}
	t.from = append(t.from[:0], t.header[:], frame[:])
	if err := t.run.backend.Send(t.from); err != nil {
		t.run.Log.Warn("the guest was not announced to the network", "err", err)
	}
}

// rarp is a request for the address of mac, from mac, to everyone.
func rarp(mac MAC) (frame [60]byte) {
	copy(frame[0:], []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	copy(frame[6:], mac[:])
	copy(frame[12:], []byte{
		0x80, 0x35, // RARP
		0, 1, 8, 0, 6, 4, // Ethernet, IPv4 and the lengths of their addresses
		0, 3, // request reverse
	})
	copy(frame[22:], mac[:]) // sender
	copy(frame[32:], mac[:]) // target
	return frame
}
