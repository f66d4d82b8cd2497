package namestest_test

import (
	"context"
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// TestRace lets requests of several queues overwrite buffers and blocks, which
// they share, while vCPUs store, a balloon takes pages, the disk changes its size
// and somebody else tracks; and compares all names at pauses.
func TestRace(t *testing.T) { proveRace(t, "names-race", disk.CacheWriteback, disk.CacheNone) }

// TestLabRace does the same where nested page tables map the guest.
func TestLabRace(t *testing.T) {
	labtest.Need(t)
	proveRace(t, "names-race-npt", disk.CacheNone)
}

func proveRace(t *testing.T, id string, caches ...disk.Cache) {
	pauses := labtest.Count(5, 50)
	var all verdict
	var asked, stores, ballooned uint64
	for _, cache := range caches {
		t.Run(cache.String(), func(t *testing.T) {
			r := newRacer(t, cache, mutant{})
			found := verdict{}
			for range pauses {
				found.add(r.round(raceRound))
			}
			r.finish()
			for _, wrong := range found.wrong {
				t.Error(wrong)
			}
			t.Logf("%+v", r.naming.Stats())
			if found.proven < leastProven*pauses || found.hints < leastHints*pauses {
				t.Errorf("compared %d proven and %d provisional names at %d pauses: too few to show anything", found.proven, found.hints, pauses)
			}
			all.add(found)
			asked, stores, ballooned = asked+r.asked.Load(), stores+r.stores.Load(), ballooned+r.ballooned.Load()
		})
	}
	labtest.Proof(t, id, "%d requests, %d stores and %d balloon pages against each other; at %d pauses with each of %d cache modes %d proven names, %d provisional ones and %d of full passes were right, %d wrong",
		asked, stores, ballooned, pauses, len(caches), all.proven, all.hints, all.passed, len(all.wrong))
}

const (
	raceQueues = 3
	// raceRound is how many requests there are at least between two pauses.
	raceRound = 200
	// How many names are compared at a pause at least, on average.
	leastProven = 20
	leastHints  = 5
	// mostLaps bounds how much longer a round may get until there are as many.
	mostLaps = 20

	// The vCPU of a memory writer stores anywhere in the first frames, the other
	// vCPU into odd pages anywhere, so that the names of even pages elsewhere
	// must be right whether proven or not.
	writerFrames = 2
	writerRate   = 500 // pages a second
	dataFrames   = (memorySize - dataStart) / frame
	// In a frame so many pages are used, to make them meet.
	usedPages = 100
	hotBlocks = 128
)

// racer is a rig under load.
type racer struct {
	*rig
	machine *trackertest.Machine
	balloon *balloonDriver
	keep    context.CancelFunc // ends the keeper of frames
	kept    chan struct{}
	n       uint64 // rounds

	asked, stores, ballooned atomic.Uint64
	hot                      atomic.Uint64 // see place
}

func newRacer(t testing.TB, cache disk.Cache, broken mutant) *racer {
	space := newSpace(t)
	machine := openMachine(t, space)
	rng := rand.New(rand.NewPCG(11, 11))
	var mu sync.Mutex
	r := &racer{machine: machine, kept: make(chan struct{})}
	r.rig = newRig(t, space, rigConfig{
		cache: cache, queues: raceQueues, tracker: machine.Tracker, broken: broken,
		arrived: func(_ int, p *passage) {
			mu.Lock()
			before, after := rng.IntN(6)*rng.IntN(60), rng.IntN(6)*rng.IntN(60)
			fail := rng.IntN(30) == 0
			mu.Unlock()
			dawdle(p, before, after, fail)
		},
	})
	r.balloon = newBalloon(t, r.driver.Machine)
	check(t, machine.Load(payload.MemWriterConfig{
		WorkingSet: writerFrames * frame, Order: payload.Random, Words: 4, Rate: writerRate, Seed: 5,
	}))
	machine.Start()
	_, err := machine.Command(t.Context(), payload.CommandPause, payload.StatePaused)
	check(t, err)
	r.startKeeper()
	return r
}

// dawdle holds a request for so many microseconds before and after the disk, or
// lets it fail without the disk.
func dawdle(p *passage, before, after int, fail bool) {
	p.hold = true
	go func() {
		time.Sleep(time.Duration(before) * time.Microsecond)
		if fail {
			p.err = errHeld
			p.end()
			return
		}
		p.move()
		<-p.done
		time.Sleep(time.Duration(after) * time.Microsecond)
		p.end()
	}()
}

// startKeeper makes frames large as a VM does, besides the prover.
func (r *racer) startKeeper() {
	var ctx context.Context
	ctx, r.keep = context.WithCancel(context.Background())
	policy := memory.DefaultFramePolicy()
	policy.Interval = 3 * time.Millisecond
	go func() {
		defer close(r.kept)
		memory.NewFrameKeeper(r.frames, policy, slog.New(slog.DiscardHandler)).Run(ctx)
	}()
	r.t.Cleanup(r.stopKeeper)
}

func (r *racer) stopKeeper() {
	r.keep()
	<-r.kept
}

// finish ends what runs between rounds.
func (r *racer) finish() {
	r.stopKeeper()
	check(r.t, r.machine.Stop())
}

// round lets everything run for so many requests, and until enough is proven,
// and compares.
func (r *racer) round(requests uint64) verdict {
	t := r.t
	r.n++
	r.hot.Store(r.n)
	r.naming.Start()
	_, err := r.machine.Command(t.Context(), payload.CommandRun, payload.StateRunning)
	check(t, err)
	stop := make(chan struct{})
	var load, wg sync.WaitGroup
	end := r.asked.Load() + requests
	for i, q := range r.queues {
		load.Go(func() { r.drive(q, rand.New(rand.NewPCG(r.n, uint64(i))), end, mostLaps*requests) })
	}
	wg.Go(func() { r.store(stop) })
	wg.Go(func() { r.inflate(stop) })
	wg.Go(func() { r.change(stop) })
	load.Wait()
	close(stop)
	wg.Wait()
	_, err = r.machine.Command(t.Context(), payload.CommandPause, payload.StatePaused)
	check(t, err)
	defer r.settle()()
	return r.compare(func(gpa memory.GPA) bool {
		return gpa < dataStart+writerFrames*frame || gpa/page%2 == 1
	})
}

// place draws a used page. Most are of the two frames that are hot in this
// round; the others can be proven meanwhile.
func (r *racer) place(rng *rand.Rand) memory.GPA {
	f := (r.hot.Load()*3 + rng.Uint64N(2)) % dataFrames
	if rng.IntN(500) == 0 {
		f = rng.Uint64N(dataFrames)
	}
	return dataStart + memory.GPA(f*frame+rng.Uint64N(usedPages)*page)
}

// block draws a block, most of them from a few that are hot.
func (r *racer) block(rng *rand.Rand) int64 {
	if rng.IntN(50) == 0 {
		return rng.Int64N(diskBlocks)
	}
	return (int64(r.hot.Load())*hotBlocks + rng.Int64N(hotBlocks)) % diskBlocks
}

// draw draws a request: overlapping others in blocks and pages, some with a page
// twice, some with parts of pages, some beyond the end of the disk.
func (r *racer) draw(rng *rand.Rand) request {
	q := request{offset: r.block(rng) * names.BlockSize}
	switch n := rng.IntN(20); {
	case n == 0:
		q.kind, q.n = kindDiscard, rng.Int64N(4)*names.BlockSize+sectorSize*(1+rng.Int64N(8))
		return q
	case n == 1:
		q.kind, q.n = kindWriteZeroes, (1+rng.Int64N(4))*names.BlockSize
		return q
	case n < 11:
		q.kind = kindRead
	default:
		q.kind = kindWrite
	}
	if rng.IntN(10) == 0 {
		q.offset += sectorSize * rng.Int64N(8)
	}
	for range 1 + rng.IntN(maxSegments) {
		m := memory.Range{Start: r.place(rng), Size: page}
		switch rng.IntN(10) {
		case 0:
			m.Size = sectorSize * uint64(1+rng.IntN(7))
			m.Start += memory.GPA(sectorSize * rng.IntN(8))
		case 1:
			m.Size *= 2
		case 2:
			if len(q.mem) > 0 {
				m = q.mem[0] // once more
			}
		}
		q.mem = append(q.mem, m)
	}
	return q
}

// drive keeps a queue busy until so many requests were made in all, and until
// enough is proven or most were made.
func (r *racer) drive(q *queue, rng *rand.Rand, end, most uint64) {
	for made := uint64(0); made < most; made++ {
		if r.asked.Load() >= end && r.naming.Stats().NamedProven >= leastProven*3 {
			break
		}
		slot := q.free()
		for ; slot < 0; slot = q.free() {
			q.wait()
			if r.t.Failed() {
				return
			}
		}
		q.submit(slot, r.draw(rng))
		r.asked.Add(1)
	}
	q.drain()
}

// store is a vCPU that stores into odd pages.
func (r *racer) store(stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(r.n, 100))
	for {
		select {
		case <-stop:
			return
		default:
		}
		gpa := r.place(rng)&^(2*page-1) + page
		b, err := r.space.Writable(gpa+memory.GPA(rng.IntN(page/8)*8), 8)
		check(r.t, err)
		binary.LittleEndian.PutUint64(b, rng.Uint64())
		r.stores.Add(1)
		time.Sleep(time.Duration(rng.IntN(100)) * time.Microsecond)
	}
}

// inflate gives pages to the balloon, one at a time or a few.
func (r *racer) inflate(stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(r.n, 200))
	for {
		select {
		case <-stop:
			return
		default:
		}
		n := 1 + rng.IntN(3)
		r.balloon.take(r.place(rng), n)
		r.ballooned.Add(uint64(n))
		time.Sleep(time.Duration(rng.IntN(5000)) * time.Microsecond)
	}
}

// change changes the size of the disk and lets somebody else track writes.
func (r *racer) change(stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(r.n, 300))
	all, set := r.space.Regions()[0].Range, r.space.NewPageSet()
	for {
		select {
		case <-stop:
			return
		case <-time.After(time.Duration(rng.IntN(20)) * time.Millisecond):
		}
		switch rng.IntN(8) {
		case 0:
			set.Clear()
			check(r.t, r.tracker.Collect(all, set, memory.Rearm))
		case 1:
			r.resize(diskBlocks - rng.Int64N(diskBlocks/8))
			r.resize(diskBlocks)
		}
	}
}
