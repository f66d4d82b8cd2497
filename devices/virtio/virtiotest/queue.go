package virtiotest

import (
	"encoding/binary"
	"runtime"
	"sync/atomic"
	"time"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// Segment is one buffer of a chain.
type Segment struct {
	GPA   memory.GPA
	Len   int
	Write bool // the device writes it
}

// Queue is the driver's side of a split virtqueue.
type Queue struct {
	d     *Driver
	index int
	size  int

	desc, avail, used memory.GPA
	notify            memory.GPA
	mem               []byte // of the whole queue, from desc on

	free      []uint16 // free descriptors
	chains    []chain  // by head
	nextAvail uint16
	kicked    uint16 // available index at the last kick
	nextUsed  uint16
	reaped    []uint16 // completed, not yet returned by WaitAny

	fenceWord atomic.Uint32
}

// chain is a submitted request.
type chain struct {
	segments []Segment
	count    int // descriptors in the ring
	done     bool
	written  uint32
}

// Patience is how long the driver waits for a device before the test fails.
const Patience = 30 * time.Second

func newQueue(d *Driver, index, size int) *Queue {
	q := &Queue{d: d, index: index, size: size, chains: make([]chain, size)}
	availOff := 16 * size
	usedOff := (availOff + 6 + 2*size + 3) &^ 3
	total := usedOff + 6 + 8*size
	q.desc = d.Alloc(total, 4096)
	q.avail, q.used = q.desc+memory.GPA(availOff), q.desc+memory.GPA(usedOff)
	q.mem, _ = d.Machine.Memory.Writable(q.desc, uint64(total))
	for i := size - 1; i >= 0; i-- {
		q.free = append(q.free, uint16(i))
	}
	return q
}

// Size is the number of entries.
func (q *Queue) Size() int { return q.size }

// Rings returns where the descriptor table, the available and the used ring
// lie.
func (q *Queue) Rings() (desc, avail, used memory.GPA) { return q.desc, q.avail, q.used }

func (q *Queue) has(feature uint64) bool { return q.d.Features&feature != 0 }

// SetDescriptor writes descriptor i raw.
func (q *Queue) SetDescriptor(i int, addr memory.GPA, n uint32, flags, next uint16) {
	putDescriptor(q.mem[16*i:], addr, n, flags, next)
}

func putDescriptor(d []byte, addr memory.GPA, n uint32, flags, next uint16) {
	binary.LittleEndian.PutUint64(d, uint64(addr))
	binary.LittleEndian.PutUint32(d[8:], n)
	binary.LittleEndian.PutUint16(d[12:], flags)
	binary.LittleEndian.PutUint16(d[14:], next)
}

// Offer puts head on the available ring, unseen until Kick or Expose.
func (q *Queue) Offer(head uint16) {
	off := int(q.avail-q.desc) + 4 + 2*(int(q.nextAvail)%q.size)
	store16(q.mem[off:], head)
	q.nextAvail++
}

// Expose makes what was offered visible without a kick.
func (q *Queue) Expose() {
	store16(q.mem[q.avail-q.desc+2:], q.nextAvail)
	q.fenceWord.Swap(0)
}

// Kick makes what was offered visible and notifies the device if it wants to
// be.
func (q *Queue) Kick() {
	q.Expose()
	if q.wantsKick() {
		q.ForceKick()
	}
	q.kicked = q.nextAvail
}

// ForceKick notifies the device whatever it wants.
func (q *Queue) ForceKick() { q.d.Write(q.notify, 2, uint64(q.index)) }

func (q *Queue) wantsKick() bool {
	used := int(q.used - q.desc)
	if q.has(virtio.FeatureEventIdx) {
		event := load16(q.mem[used+4+8*q.size:])
		return q.nextAvail-event-1 < q.nextAvail-q.kicked
	}
	return load16(q.mem[used:])&1 == 0
}

// Add puts a chain of segments on the ring and returns its head. It uses an
// indirect table if indirect and the feature allow. The test fails when the
// ring is full.
func (q *Queue) Add(indirect bool, segments ...Segment) uint16 {
	q.d.TB.Helper()
	head := uint16(0)
	indirect = indirect && q.has(virtio.FeatureIndirectDesc)
	count := len(segments)
	if indirect {
		count = 1
	}
	if len(q.free) < count {
		q.d.TB.Fatalf("queue %d has no %d free descriptors", q.index, count)
	}
	head = q.free[len(q.free)-1]
	c := &q.chains[head]
	*c = chain{segments: append(c.segments[:0], segments...), count: count}
	if indirect {
		q.addIndirect(segments)
	} else {
		q.addDirect(segments)
	}
	q.Offer(head)
	return head
}

func (q *Queue) addIndirect(segments []Segment) {
	table := q.d.Alloc(16*len(segments), 16)
	mem, _ := q.d.Machine.Memory.Writable(table, uint64(16*len(segments)))
	for i, s := range segments {
		flags, next := s.flags(), uint16(0)
		if i < len(segments)-1 {
			flags, next = flags|1, uint16(i+1)
		}
		putDescriptor(mem[16*i:], s.GPA, uint32(s.Len), flags, next)
	}
	head := q.take()
	q.SetDescriptor(int(head), table, uint32(16*len(segments)), 4, 0)
}

func (q *Queue) addDirect(segments []Segment) {
	for i, s := range segments {
		at := q.take()
		flags, next := s.flags(), uint16(0)
		if i < len(segments)-1 {
			flags, next = flags|1, q.free[len(q.free)-1]
		}
		q.SetDescriptor(int(at), s.GPA, uint32(s.Len), flags, next)
	}
}

func (s Segment) flags() uint16 {
	if s.Write {
		return 2
	}
	return 0
}

func (q *Queue) take() uint16 {
	at := q.free[len(q.free)-1]
	q.free = q.free[:len(q.free)-1]
	return at
}

// Submit copies out into fresh guest memory, adds buffers of the sizes in for
// the answer, and puts the chain on the ring.
func (q *Queue) Submit(out [][]byte, in ...int) uint16 {
	q.d.TB.Helper()
	var segments []Segment
	for _, b := range out {
		at := q.d.Alloc(len(b), 16)
		mem, _ := q.d.Machine.Memory.Writable(at, uint64(len(b)))
		copy(mem, b)
		segments = append(segments, Segment{GPA: at, Len: len(b)})
	}
	for _, n := range in {
		segments = append(segments, Segment{GPA: q.d.Alloc(n, 16), Len: n, Write: true})
	}
	return q.Add(len(segments) > 2, segments...)
}

// Do submits a chain, kicks, waits for it and returns what the device wrote.
func (q *Queue) Do(out [][]byte, in ...int) []byte {
	q.d.TB.Helper()
	head := q.Submit(out, in...)
	q.Kick()
	return q.Wait(head)
}

// Wait waits for a chain's completion and returns the bytes that the device
// says it wrote.
func (q *Queue) Wait(head uint16) []byte {
	q.d.TB.Helper()
	deadline := time.Now().Add(Patience)
	for !q.chains[head].done {
		if q.Reap() > 0 {
			continue
		}
		q.block(deadline)
	}
	return q.Written(head)
}

// WaitAny waits for any chain's completion and returns its head. Completions
// that it has seen together it returns one by one.
func (q *Queue) WaitAny() uint16 {
	q.d.TB.Helper()
	deadline := time.Now().Add(Patience)
	for len(q.reaped) == 0 {
		if q.Reap() == 0 {
			q.block(deadline)
		}
	}
	head := q.reaped[0]
	q.reaped = q.reaped[1:]
	return head
}

// Drained reports that WaitAny would have to look at the ring.
func (q *Queue) Drained() bool { return len(q.reaped) == 0 }

// Written returns the bytes that the device says it wrote to a finished chain.
func (q *Queue) Written(head uint16) []byte {
	q.d.TB.Helper()
	c := &q.chains[head]
	var data []byte
	left := int(c.written)
	for _, s := range c.segments {
		if n := min(left, s.Len); s.Write && n > 0 {
			mem, _ := q.d.Machine.Memory.View(s.GPA, uint64(n))
			data = append(data, mem...)
			left -= n
		}
	}
	if left > 0 {
		q.d.TB.Fatalf("device claims to have written %d bytes more than the chain has", left)
	}
	return data
}

// Writable returns all device-writable bytes of a chain, written or not.
func (q *Queue) Writable(head uint16) []byte {
	var data []byte
	for _, s := range q.chains[head].segments {
		if s.Write {
			mem, _ := q.d.Machine.Memory.View(s.GPA, uint64(s.Len))
			data = append(data, mem...)
		}
	}
	return data
}

// Done reports whether a chain was completed and reaped.
func (q *Queue) Done(head uint16) bool { return q.chains[head].done }

// Reap takes completed chains off the used ring and returns how many.
func (q *Queue) Reap() int {
	q.d.TB.Helper()
	used := int(q.used - q.desc)
	now := load16(q.mem[used+2:])
	n := 0
	for ; q.nextUsed != now; q.nextUsed++ {
		entry := q.mem[used+4+8*(int(q.nextUsed)%q.size):]
		head := binary.LittleEndian.Uint32(entry)
		if head >= uint32(q.size) || q.chains[head].count == 0 || q.chains[head].done {
			q.d.TB.Fatalf("device completed chain %d, which is not in flight", head)
		}
		c := &q.chains[head]
		c.done, c.written = true, binary.LittleEndian.Uint32(entry[4:])
		if len(q.reaped) == q.size {
			q.reaped = q.reaped[1:] // nobody asks for them
		}
		q.reaped = append(q.reaped, uint16(head))
		q.release(uint16(head))
		n++
	}
	return n
}

// release gives a chain's descriptors back.
func (q *Queue) release(head uint16) {
	for i, at := 0, head; i < q.chains[head].count; i++ {
		q.free = append(q.free, at)
		at = binary.LittleEndian.Uint16(q.mem[16*int(at)+14:])
	}
}

// block waits for an interrupt, or polls when the queue has no vector.
func (q *Queue) block(deadline time.Time) {
	q.d.TB.Helper()
	if q.has(virtio.FeatureEventIdx) {
		store16(q.mem[int(q.avail-q.desc)+4+2*q.size:], q.nextUsed)
		q.fenceWord.Swap(0)
	}
	if load16(q.mem[int(q.used-q.desc)+2:]) != q.nextUsed {
		return
	}
	q.d.Write(q.d.Common+regQueueSelect, 2, uint64(q.index))
	if q.d.Read(q.d.Common+regQueueVector, 2) == 0xFFFF || !q.d.msixEnabled() {
		runtime.Gosched()
		if time.Now().After(deadline) {
			q.d.TB.Fatalf("queue %d: no completion seen by polling", q.index)
		}
		return
	}
	timer := time.NewTimer(time.Until(deadline))
	defer timer.Stop()
	select {
	case <-q.d.Machine.MSIs.Arrived(q.d.Message(q.index)):
	case <-timer.C:
		q.d.TB.Fatalf("queue %d: no interrupt", q.index)
	}
}

func (d *Driver) msixEnabled() bool { return d.ConfigRead(d.msixCap+2, 2)&0x8000 != 0 }
