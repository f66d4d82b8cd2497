package namestest_test

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// Pages and blocks of the schedules. The pages lie in one large frame.
const (
	pageP = memory.GPA(dataStart + 5*page)
	pageQ = memory.GPA(dataStart + 9*page)

	block0 = 40
	block1 = 41
	// lastBlock is where a disk that is cut short has none.
	lastBlock = diskBlocks - 3
)

// stage is a rig in which one request at a time moves, when it is told to.
type stage struct {
	*rig
	broken  mutant
	arrived [stageQueues]chan *passage
	stored  map[memory.GPA]bool // pages into which a vCPU stored
}

const stageQueues = 2

// flight is a request that the device has taken and that is held.
type flight struct {
	*passage
	queue *queue
	t     testing.TB
}

// newStage makes a stage whose pages hold bytes that no block holds.
func newStage(t testing.TB, broken mutant) *stage {
	s := &stage{broken: broken, stored: map[memory.GPA]bool{}}
	for i := range s.arrived {
		s.arrived[i] = make(chan *passage, 1)
	}
	space := newSpace(t)
	s.rig = newRig(t, space, rigConfig{
		cache: disk.CacheWriteback, queues: stageQueues, tracker: openTracker(t, space), broken: broken,
		arrived: func(queue int, p *passage) {
			p.hold = true
			s.arrived[queue] <- p
		},
	})
	for i, gpa := range []memory.GPA{pageP, pageQ} {
		b := make([]byte, page)
		_, _ = rand.NewChaCha8([32]byte{byte(i), 77}).Read(b)
		check(t, space.WriteAt(b, gpa))
	}
	return s
}

// begin asks for a request and returns when the device has taken it, before it
// reaches the disk.
func (s *stage) begin(queue int, r request) *flight {
	s.t.Helper()
	q := s.queues[queue]
	q.submit(0, r)
	select {
	case p := <-s.arrived[queue]:
		return &flight{passage: p, queue: q, t: s.t}
	case <-time.After(virtiotest.Patience):
		s.t.Fatal("the device does not take a request")
		return nil
	}
}

// move lets the request reach the disk and returns when the disk has done it.
func (f *flight) move() {
	f.t.Helper()
	f.passage.move()
	select {
	case <-f.done:
	case <-time.After(virtiotest.Patience):
		f.t.Fatal("the disk does not do a request")
	}
}

// end lets the device hear of it and waits until the driver has.
func (f *flight) end() {
	f.passage.end()
	f.queue.drain()
}

// errHeld is how a request fails that never reached the disk.
var errHeld = errors.New("the request was held and failed")

// fail ends a request that did not reach the disk.
func (f *flight) fail() {
	f.err = errHeld
	f.end()
}

// do lets a request go all the way.
func (s *stage) do(r request) {
	s.t.Helper()
	f := s.begin(stageQueues-1, r)
	f.move()
	f.end()
}

// read and write are requests of whole pages at a block.
func read(block int64, pages ...memory.GPA) request { return transfer(kindRead, block, pages) }

func write(block int64, pages ...memory.GPA) request { return transfer(kindWrite, block, pages) }

func transfer(kind uint32, block int64, pages []memory.GPA) request {
	r := request{kind: kind, offset: block * names.BlockSize}
	for _, gpa := range pages {
		r.mem = append(r.mem, memory.Range{Start: gpa, Size: page})
	}
	return r
}

func zero(block int64) request {
	return request{kind: kindWriteZeroes, offset: block * names.BlockSize, n: names.BlockSize}
}

func discard(block int64) request {
	return request{kind: kindDiscard, offset: block * names.BlockSize, n: names.BlockSize}
}

// prove waits until the name of a page is proven.
func (s *stage) prove(gpa memory.GPA) {
	s.t.Helper()
	s.naming.Start()
	defer s.naming.Stop()
	for end := time.Now().Add(virtiotest.Patience); !s.naming.Table().At(gpa.GFN()).Proven(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			s.t.Fatalf("page %s is %s and not proven", gpa, s.naming.Table().At(gpa.GFN()))
		}
	}
}

// store is a vCPU's.
func (s *stage) store(gpa memory.GPA) {
	s.t.Helper()
	b, err := s.space.Writable(gpa, page)
	check(s.t, err)
	b[100]++
	s.stored[gpa] = true
	if s.broken.stored != nil {
		s.broken.stored()
	}
}

// hostWrite is a write of the VMM that is no disk's.
func (s *stage) hostWrite(gpa memory.GPA) {
	s.t.Helper()
	check(s.t, s.space.WriteAt([]byte("written by the VMM"), gpa+100))
}

// rearm is somebody else's round of tracking: a migration's, a snapshot's.
func (s *stage) rearm() {
	s.t.Helper()
	all := s.space.Regions()[0].Range
	check(s.t, s.tracker.Collect(all, s.space.NewPageSet(), memory.Rearm))
}

// look compares what is named now.
func (s *stage) look() verdict {
	s.t.Helper()
	defer s.settle()()
	return s.compare(func(gpa memory.GPA) bool { return s.stored[gpa&^(page-1)] })
}
