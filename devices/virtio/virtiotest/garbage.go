package virtiotest

import (
	"runtime"
	"testing"
	"time"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

func gpa(n uint64) memory.GPA { return memory.GPA(n) }

// outside is an address without RAM.
const outside = memory.GPA(1) << 40

// garbage is one way for a driver to break the ring protocol.
type garbage struct {
	name  string
	write func(q *Queue)
}

var rubbish = [...]garbage{
	{"head out of range", func(q *Queue) { q.Offer(uint16(q.size)) }},
	{"head far out of range", func(q *Queue) { q.Offer(0xFFFF) }},
	{"available index jumps", func(q *Queue) { q.nextAvail += uint16(q.size) + 1 }},
	{"available index wraps", func(q *Queue) { q.nextAvail-- }},
	{"direct loop", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(16, 16), 16, 1, 1)
		q.SetDescriptor(1, q.d.Alloc(16, 16), 16, 1, 0)
		q.Offer(0)
	}},
	{"loop of one", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(16, 16), 16, 1, 0)
		q.Offer(0)
	}},
	{"next out of range", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(16, 16), 16, 1, uint16(q.size))
		q.Offer(0)
	}},
	{"buffer outside memory", func(q *Queue) {
		q.SetDescriptor(0, outside, 16, 0, 0)
		q.Offer(0)
	}},
	{"buffer across the end of memory", func(q *Queue) {
		q.SetDescriptor(0, memorySize-8, 16, 0, 0)
		q.Offer(0)
	}},
	{"buffer wraps", func(q *Queue) {
		q.SetDescriptor(0, ^memory.GPA(0)-7, 16, 2, 0)
		q.Offer(0)
	}},
	{"buffer of no bytes", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(16, 16), 0, 0, 0)
		q.Offer(0)
	}},
	{"buffer of 4 GiB", func(q *Queue) {
		q.SetDescriptor(0, 0, 0xFFFFFFFF, 2, 0)
		q.Offer(0)
	}},
	{"readable after writable", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(16, 16), 16, 1|2, 1)
		q.SetDescriptor(1, q.d.Alloc(16, 16), 16, 0, 0)
		q.Offer(0)
	}},
	{"indirect table of an odd size", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(64, 16), 17, 4, 0)
		q.Offer(0)
	}},
	{"indirect table of no bytes", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(64, 16), 0, 4, 0)
		q.Offer(0)
	}},
	{"indirect table outside memory", func(q *Queue) {
		q.SetDescriptor(0, outside, 64, 4, 0)
		q.Offer(0)
	}},
	{"indirect table of 4 GiB", func(q *Queue) {
		q.SetDescriptor(0, 0, 0xFFFFFFF0, 4, 0)
		q.Offer(0)
	}},
	{"indirect and next", func(q *Queue) {
		q.SetDescriptor(0, q.d.Alloc(64, 16), 16, 4|1, 1)
		q.Offer(0)
	}},
	{"indirect inside indirect", func(q *Queue) {
		at := q.d.Alloc(64, 16)
		table, _ := q.d.Machine.Memory.Writable(at, 64)
		putDescriptor(table, at, 16, 4, 0)
		q.SetDescriptor(0, at, 16, 4, 0)
		q.Offer(0)
	}},
	{"loop in an indirect table", func(q *Queue) {
		at := q.d.Alloc(64, 16)
		table, _ := q.d.Machine.Memory.Writable(at, 64)
		putDescriptor(table, q.d.Alloc(16, 16), 16, 1, 0)
		q.SetDescriptor(0, at, 64, 4, 0)
		q.Offer(0)
	}},
	{"next out of an indirect table", func(q *Queue) {
		at := q.d.Alloc(64, 16)
		table, _ := q.d.Machine.Memory.Writable(at, 64)
		putDescriptor(table, q.d.Alloc(16, 16), 16, 1, 4)
		q.SetDescriptor(0, at, 64, 4, 0)
		q.Offer(0)
	}},
}

// testGarbage breaks the protocol in every way on every queue. The device must
// ask for a reset on the queues that it drains, pause and reset on all, and
// work afterwards.
func testGarbage(t *testing.T, s Subject) {
	for _, g := range rubbish {
		t.Run(g.name, func(t *testing.T) {
			d := s.driver(t)
			for i := range s.New(t).QueueSizes() {
				d.Start(allFeatures, 16)
				g.write(d.Queue(i))
				d.Queue(i).Expose()
				d.Queue(i).ForceKick()
				if s.drains(i) {
					d.waitNeedsReset(t, i)
				}
				d.Function.Pause()
				if err := d.Function.Resume(); err != nil {
					t.Fatal(err)
				}
			}
			d.Start(allFeatures, 16)
			s.request(t, d)
		})
	}
}

func (s Subject) drains(i int) bool {
	for _, drained := range s.Drained {
		if drained == i {
			return true
		}
	}
	return false
}

// waitNeedsReset waits until the device asks for a reset.
func (d *Driver) waitNeedsReset(t *testing.T, queue int) {
	t.Helper()
	for deadline := time.Now().Add(Patience); d.Status()&virtio.StatusNeedsReset == 0; runtime.Gosched() {
		if time.Now().After(deadline) {
			t.Fatalf("queue %d: the device does not ask for a reset", queue)
		}
	}
}

// testQueueOutsideMemory starts the device with rings where no RAM is.
func testQueueOutsideMemory(t *testing.T, s Subject) {
	d := s.driver(t)
	for _, at := range []memory.GPA{outside, memorySize - 16, ^memory.GPA(0) &^ 15, 8} {
		d.Reset()
		d.Negotiate(allFeatures)
		d.Write(d.Common+regQueueSelect, 2, 0)
		d.writeAddress(regQueueDesc, at)
		d.writeAddress(regQueueDriver, at)
		d.writeAddress(regQueueDevice, at)
		d.Write(d.Common+regQueueEnable, 2, 1)
		d.SetStatus(virtio.StatusDriverOK)
		if d.Status()&virtio.StatusNeedsReset == 0 {
			t.Errorf("rings at %s are accepted", at)
		}
	}
	d.Start(allFeatures, 16)
	s.request(t, d)
}
