package blk

import (
	"encoding/binary"
	"errors"
	"slices"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

// fakeDisk is a disk in memory, shared by its queues, that remembers in which
// order things happened.
type fakeDisk struct {
	mu     sync.Mutex
	data   []byte
	events []string
	fail   error         // what every request fails with, if not nil
	gate   chan struct{} // if not nil, requests wait for it to be closed
}

func newFakeDisk(size int) *fakeDisk { return &fakeDisk{data: make([]byte, size)} }

func (d *fakeDisk) note(event string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = append(d.events, event)
}

func (d *fakeDisk) setFailure(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = err
}

func (d *fakeDisk) seen() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return slices.Clone(d.events)
}

// fakeQueue completes each request on a goroutine of its own.
type fakeQueue struct {
	d     *fakeDisk
	event int
	batch []func()
	wg    sync.WaitGroup

	mu   sync.Mutex
	done []fakeDone
}

type fakeDone struct {
	token int
	err   error
}

func (d *fakeDisk) newQueue(int) (IOQueue, error) {
	event, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	return &fakeQueue{d: d, event: event}, err
}

func (q *fakeQueue) FDs() []int { return []int{q.event} }

func (q *fakeQueue) add(token int, event string, run func()) {
	q.batch = append(q.batch, func() {
		defer q.wg.Done()
		q.d.mu.Lock()
		gate := q.d.gate
		q.d.mu.Unlock()
		if gate != nil {
			<-gate
		}
		q.d.mu.Lock()
		err := q.d.fail
		if err == nil {
			run()
			q.d.events = append(q.d.events, event)
		}
		q.d.mu.Unlock()
		q.mu.Lock()
		q.done = append(q.done, fakeDone{token, err})
		q.mu.Unlock()
		one := [8]byte{1}
		_, _ = unix.Write(q.event, one[:])
	})
}

func (q *fakeQueue) Read(token int, bufs [][]byte, offset int64) {
	q.add(token, "read", func() {
		for _, b := range bufs {
			offset += int64(copy(b, q.d.data[offset:]))
		}
	})
}

func (q *fakeQueue) Write(token int, bufs [][]byte, offset int64, sync bool) {
	event := "write"
	if sync {
		event = "write stable"
	}
	q.add(token, event, func() {
		for _, b := range bufs {
			offset += int64(copy(q.d.data[offset:], b))
		}
	})
}

func (q *fakeQueue) Flush(token int) { q.add(token, "flush", func() {}) }

func (q *fakeQueue) Discard(token int, offset, n int64) { q.add(token, "discard", func() {}) }

func (q *fakeQueue) WriteZeroes(token int, offset, n int64, unmap bool) {
	event := "zero"
	if unmap {
		event = "zero unmap"
	}
	q.add(token, event, func() { clear(q.d.data[offset : offset+n]) })
}

func (q *fakeQueue) Submit() {
	for _, run := range q.batch {
		q.wg.Add(1)
		go run()
	}
	q.batch = nil
}

func (q *fakeQueue) Completed() (int, error, bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(q.done) == 0 {
		return 0, nil, false
	}
	c := q.done[0]
	q.done = q.done[1:]
	return c.token, c.err, true
}

func (q *fakeQueue) Wait() {
	var count [8]byte
	q.mu.Lock()
	ready := len(q.done) > 0
	q.mu.Unlock()
	if !ready {
		_, _ = unix.Read(q.event, count[:])
	}
}

func (q *fakeQueue) Close() error {
	q.wg.Wait()
	return unix.Close(q.event)
}

// newDevice makes a device over a fake disk; change may alter its config.
func newDevice(tb testing.TB, disk *fakeDisk, change func(*Config)) *Device {
	tb.Helper()
	c := Config{Size: int64(len(disk.data)), Serial: "ditto-0", QueueSize: 64, NewIOQueue: disk.newQueue}
	if change != nil {
		change(&c)
	}
	d, err := New(c)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

// header is a request header.
func header(kind uint32, sector uint64) []byte {
	h := make([]byte, headerSize)
	binary.LittleEndian.PutUint32(h, kind)
	binary.LittleEndian.PutUint64(h[8:], sector)
	return h
}

// segment is what follows the header of a discard or write-zeroes.
func segment(sector uint64, sectors, flags uint32) []byte {
	s := make([]byte, segmentSize)
	binary.LittleEndian.PutUint64(s, sector)
	binary.LittleEndian.PutUint32(s[8:], sectors)
	binary.LittleEndian.PutUint32(s[12:], flags)
	return s
}

// do makes a request and returns its data and status.
func do(tb testing.TB, q *virtiotest.Queue, out [][]byte, in int) (data []byte, status byte) {
	tb.Helper()
	sizes := []int{statusSize}
	if in > 0 {
		sizes = []int{in, statusSize}
	}
	head := q.Submit(out, sizes...)
	q.Kick()
	q.Wait(head)
	answer := q.Writable(head)
	return answer[:in], answer[in]
}

var errDisk = errors.New("the disk has failed")

const allFeatures = ^uint64(0)

func start(tb testing.TB, dev virtio.Device) *virtiotest.Driver {
	tb.Helper()
	d := virtiotest.NewDriver(tb, dev)
	d.Start(allFeatures, 64)
	return d
}
