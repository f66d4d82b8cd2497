package virtio

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"ditto.vm/memory"
)

// Limits on what a driver may ask for.
const (
	// MaxQueueSize is the largest ring that a device may offer. 1024 is also
	// the kernel's IOV_MAX, so that any chain of one ring goes to a file or
	// a tap in one system call.
	MaxQueueSize = 1024
	// MaxChainLength bounds the descriptors of one chain, indirect ones
	// included, for the same reason.
	MaxChainLength = 1024
	// MaxChainBytes bounds the buffers of one chain. Drivers send at most
	// 32 MiB (U-Boot's longest disk read); the cap keeps one request from
	// holding a worker for long. [Queue.SetMaxChainBytes] changes it.
	MaxChainBytes = 64 << 20
)

// Descriptor and ring flags (virtio 1.2 2.7.5, 2.7.6, 2.7.8).
const (
	descNext     = 1
	descWrite    = 2
	descIndirect = 4

	availNoInterrupt = 1
	usedNoNotify     = 1
)

const (
	descSize     = 16
	ringHeader   = 4 // flags, idx
	availEntry   = 2
	usedEntry    = 8
	eventSize    = 2
	ringFlagsOff = 0
	ringIndexOff = 2
)

// QueueConfig says where a queue lies and where it stands. All of it comes
// from the guest, or from a saved state.
type QueueConfig struct {
	Size uint16 // entries, a power of two
	// Desc, Avail and Used are the descriptor table, the driver area and the
	// device area, aligned to 16, 2 and 4 bytes.
	Desc, Avail, Used memory.GPA
	// NextAvail is the index of the next chain to take, NextUsed that of the
	// next chain to give back. Both are 0 for a fresh queue.
	NextAvail, NextUsed uint16
}

// QueueHooks connect a queue to its transport.
type QueueHooks struct {
	// Features are the negotiated bits.
	Features uint64
	// KickFD is the eventfd that the driver's notifications signal.
	KickFD int
	// Interrupt tells the driver to look at the used ring.
	Interrupt func()
	// Failed is called once, when the driver broke the ring's protocol.
	Failed func(error)
}

// Queue is the device's side of a split virtqueue (virtio 1.2 2.7). One
// goroutine owns it; nothing of it may be called from another while that one
// works.
type Queue struct {
	mem   *memory.Space
	hooks QueueHooks
	index int
	at    QueueConfig

	size, mask uint16
	maxBytes   uint64 // of one chain
	eventIdx   bool
	indirect   bool
	broken     bool
	quiet      bool // VIRTQ_USED_F_NO_NOTIFY is set

	desc, avail, used []byte // guest memory

	nextAvail uint16 // next chain to take
	seenAvail uint16 // the driver's index as last read
	armedAt   uint16 // avail_event as last written
	armed     bool   // armedAt was written at all
	nextUsed  uint16 // next used entry to fill, staged entries included
	published uint16 // used index as the driver sees it

	fenceWord atomic.Uint32
}

// ErrQueue is wrapped by every breach of the ring protocol.
var ErrQueue = errors.New("virtqueue protocol error")

// NewQueue checks where the driver placed the queue and attaches to it.
func NewQueue(mem *memory.Space, index int, at QueueConfig, hooks QueueHooks) (*Queue, error) {
	if at.Size == 0 || at.Size > MaxQueueSize || at.Size&(at.Size-1) != 0 {
		return nil, fmt.Errorf("%w: size %d is not a power of two up to %d", ErrQueue, at.Size, MaxQueueSize)
	}
	if at.Desc%16 != 0 || at.Avail%2 != 0 || at.Used%4 != 0 {
		return nil, fmt.Errorf("%w: misaligned rings %s %s %s", ErrQueue, at.Desc, at.Avail, at.Used)
	}
	if at.NextAvail-at.NextUsed > at.Size {
		return nil, fmt.Errorf("%w: %d chains in flight in a ring of %d", ErrQueue, at.NextAvail-at.NextUsed, at.Size)
	}
	q := &Queue{
		mem: mem, hooks: hooks, index: index, at: at,
		size: at.Size, mask: at.Size - 1, maxBytes: MaxChainBytes,
		eventIdx:  hooks.Features&FeatureEventIdx != 0,
		indirect:  hooks.Features&FeatureIndirectDesc != 0,
		nextAvail: at.NextAvail, seenAvail: at.NextAvail,
		nextUsed: at.NextUsed, published: at.NextUsed,
	}
	size := uint64(at.Size)
	var err error
	if q.desc, err = mem.View(at.Desc, size*descSize); err != nil {
		return nil, fmt.Errorf("%w: descriptor table: %w", ErrQueue, err)
	}
	if q.avail, err = mem.View(at.Avail, ringHeader+size*availEntry+eventSize); err != nil {
		return nil, fmt.Errorf("%w: available ring: %w", ErrQueue, err)
	}
	if q.used, err = mem.Writable(at.Used, ringHeader+size*usedEntry+eventSize); err != nil {
		return nil, fmt.Errorf("%w: used ring: %w", ErrQueue, err)
	}
	return q, nil
}

// Index is the queue's number in the device.
func (q *Queue) Index() int { return q.index }

// Size is the number of entries, a power of two.
func (q *Queue) Size() int { return int(q.size) }

// SetMaxChainBytes replaces [MaxChainBytes] for this queue: a balloon's free
// page reports name far more memory than they make the device touch.
func (q *Queue) SetMaxChainBytes(n uint64) { q.maxBytes = n }

// KickFD is the eventfd that becomes readable when the driver kicks the
// queue. A [Worker] waits on it; others need not touch it.
func (q *Queue) KickFD() int { return q.hooks.KickFD }

// Config returns where the queue lies and stands. Between chains it is all
// that a restored queue needs.
func (q *Queue) Config() QueueConfig {
	c := q.at
	c.NextAvail, c.NextUsed = q.nextAvail, q.published
	return c
}

// InFlight is the number of chains taken and not yet pushed.
func (q *Queue) InFlight() int { return int(q.nextAvail - q.nextUsed) }

// Broken reports that the driver broke the protocol. Pop then finds nothing
// and what is pushed is not published, until the driver resets the device.
func (q *Queue) Broken() bool { return q.broken }

// Pop takes the next available chain. It returns false when there is none, or
// when the driver broke the protocol. Before it returns false it asks the
// driver to kick for the next chain, so the caller may go and wait.
func (q *Queue) Pop(c *Chain) bool {
	if q.broken || !q.more() {
		return false
	}
	if q.InFlight() >= int(q.size) {
		q.breach("more chains than descriptors are in flight")
		return false
	}
	head := load16(q.avail, ringHeader+int(q.nextAvail&q.mask)*availEntry)
	c.reset()
	c.Head, c.mem = head, q.mem
	if !q.walk(c, head) {
		return false
	}
	q.nextAvail++
	return true
}

// Empty reports that no chain is waiting, and then asks the driver to kick for
// the next, exactly as Pop does.
func (q *Queue) Empty() bool { return q.broken || !q.more() }

// Waiting reports whether chains are waiting. Unlike [Queue.Empty] it does not
// ask for a kick when there is none.
func (q *Queue) Waiting() bool {
	return !q.broken && (q.nextAvail != q.seenAvail || q.nextAvail != load16(q.avail, ringIndexOff))
}

// Rewind un-takes the last n chains taken, none of which was pushed: the next
// Pop finds them again. Devices that hold a buffer for later use it in Pause. It
// panics when so many are not in flight: no guest can bring that about.
func (q *Queue) Rewind(n int) {
	if n < 0 || n > q.InFlight() {
		panic("virtio: rewind of chains that are not in flight")
	}
	q.nextAvail -= uint16(n)
}

// more reads the driver's index when the known chains are used up. Finding
// none, it turns notifications on and looks again, because the driver may
// have added a chain just before it could see the request to kick.
func (q *Queue) more() bool {
	if q.nextAvail != q.seenAvail {
		return true
	}
	q.seenAvail = load16(q.avail, ringIndexOff)
	if q.nextAvail == q.seenAvail {
		q.listen()
		q.seenAvail = load16(q.avail, ringIndexOff)
		if q.nextAvail == q.seenAvail {
			return false
		}
	}
	if q.seenAvail-q.nextAvail > q.size {
		q.breach("available index jumped")
		return false
	}
	q.hush()
	return true
}

// listen asks the driver to kick for the next chain (virtio 1.2 2.7.10).
func (q *Queue) listen() {
	switch {
	case q.eventIdx:
		if q.armed && q.armedAt == q.nextAvail {
			return
		}
		off := ringHeader + int(q.size)*usedEntry
		store16(q.used, off, q.nextAvail)
		q.mem.Wrote(q.at.Used+memory.GPA(off), eventSize)
		q.armed, q.armedAt = true, q.nextAvail
	case q.quiet:
		store16(q.used, ringFlagsOff, 0)
		q.mem.Wrote(q.at.Used, 2)
		q.quiet = false
	default:
		return
	}
	fence(&q.fenceWord)
}

// hush tells a driver without EVENT_IDX not to kick while the ring is being
// drained. With EVENT_IDX the stale avail_event says so already.
func (q *Queue) hush() {
	if q.eventIdx || q.quiet {
		return
	}
	store16(q.used, ringFlagsOff, usedNoNotify)
	q.mem.Wrote(q.at.Used, 2)
	q.quiet = true
}

// Push gives a chain back, of whose writable part the device wrote the first
// written bytes. The driver does not see it before [Queue.Publish]. It panics when
// no chain is in flight: no guest can bring that about.
func (q *Queue) Push(head uint16, written uint32) {
	if q.nextAvail == q.nextUsed {
		panic("virtio: push of a chain that is not in flight")
	}
	entry := q.used[ringHeader+int(q.nextUsed&q.mask)*usedEntry:][:usedEntry]
	binary.LittleEndian.PutUint32(entry[0:], uint32(head))
	binary.LittleEndian.PutUint32(entry[4:], written)
	q.nextUsed++
}

// Publish makes everything pushed visible to the driver, and interrupts it
// when it asked for that: one interrupt for the whole batch.
func (q *Queue) Publish() {
	old, n := q.published, q.nextUsed-q.published
	if n == 0 || q.broken {
		return
	}
	q.reportUsed(old, n)
	store16(q.used, ringIndexOff, q.nextUsed)
	q.mem.Wrote(q.at.Used+ringIndexOff, 2)
	q.published = q.nextUsed
	fence(&q.fenceWord)
	if q.wantsInterrupt(old, q.nextUsed) {
		q.hooks.Interrupt()
	}
}

// Interrupt tells the driver to look at the ring, whatever it asked for. A
// restored device does so once, because an interrupt may have been lost.
func (q *Queue) Interrupt() { q.hooks.Interrupt() }

// reportUsed tells the memory's observer which used entries changed.
func (q *Queue) reportUsed(from, n uint16) {
	first := from & q.mask
	run := min(n, q.size-first)
	q.mem.Wrote(q.at.Used+ringHeader+memory.GPA(first)*usedEntry, uint64(run)*usedEntry)
	if rest := n - run; rest > 0 {
		q.mem.Wrote(q.at.Used+ringHeader, uint64(rest)*usedEntry)
	}
}

// wantsInterrupt asks the driver's flag or used_event (virtio 1.2 2.7.7.2).
func (q *Queue) wantsInterrupt(old, now uint16) bool {
	if !q.eventIdx {
		return load16(q.avail, ringFlagsOff)&availNoInterrupt == 0
	}
	event := load16(q.avail, ringHeader+int(q.size)*availEntry)
	return now-event-1 < now-old
}

// Fail stops the queue because the driver broke the device's protocol: Pop
// finds nothing more, nothing more is published, and the driver is told that
// the device needs a reset. Only the first failure counts.
func (q *Queue) Fail(reason error) {
	if q.broken {
		return
	}
	q.broken = true
	q.hooks.Failed(fmt.Errorf("queue %d: %w", q.index, reason))
}

// Kick makes the queue's owner look at it again, as if the driver had kicked.
// Workers use it to take turns with other work. Safe from any goroutine.
func (q *Queue) Kick() { signal(q.hooks.KickFD) }

// breach fails the queue for what is wrong with the ring itself.
func (q *Queue) breach(format string, args ...any) {
	q.Fail(fmt.Errorf("%w: %s", ErrQueue, fmt.Sprintf(format, args...)))
}
