package names

import (
	"context"
	"fmt"
	"math/bits"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/memory"
)

// Steps is a set of steps of a [Pass].
type Steps uint8

// The steps, in the order in which a page goes through them until one of them
// names it. Pages that are not populated are named zero before the first.
const (
	// StepProven takes what the table has proven. Memory is not touched.
	StepProven Steps = 1 << iota
	// StepZero finds pages of zeros.
	StepZero
	// StepRecorded compares pages with the blocks that the table suggests: by
	// digest where the layer is immutable and has an index, else byte by byte.
	StepRecorded
	// StepIndex looks pages up in the indexes of the layers: by XXH3-64, which
	// excludes most, then by BLAKE3. Blocks of layers that are written are
	// compared byte by byte.
	StepIndex
	// StepDuplicates compares what is left with each other.
	StepDuplicates

	AllSteps Steps = 1<<stepCount - 1

	stepCount = 5
)

var stepNames = [stepCount]string{"proven", "zero", "recorded", "index", "duplicates"}

// String lists the steps, joined by "+", or returns "none".
func (s Steps) String() string {
	var names []string
	for i, name := range stepNames {
		if s&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, "+")
}

// Recorded is the part of a [Table] that a [Pass] reads.
type Recorded interface {
	// Load fills dst with the names recorded for the pages from gfn on, which
	// lie in one region.
	Load(dst []Name, gfn memory.GFN)
}

// Pass names all of a guest's memory.
//
//	                  2 MiB at a time, on all cores
//	not populated? -> proven? -> zero? -> recorded? -> in an index? ----> equal
//	      |             |          |          |             |            pages?
//	    zero          name       zero       block         block            |
//	                                                              the lowest is unique
//	                                                              page(lowest)
//
// The VM is paused: its vCPUs stand still, its devices are drained, and the
// table is settled, so that what it calls proven is. Otherwise say Running.
//
// Besides its [Map] a pass takes a bit for each page, 8 bytes for each page
// that gets as far as the last step, and about 1 MiB for each worker, whatever
// the guest wrote. So it is with time: pages made to collide in XXH3 cost one
// BLAKE3 each.
type Pass struct {
	Space *memory.Space
	// Table gives the names that are recorded; nil for none.
	Table Recorded
	// Layers are those that names number.
	Layers []Layer
	// Steps are those to take; zero means all.
	Steps Steps
	// Workers bounds the cores in use; zero means all.
	Workers int
	// Running says that the guest may write meanwhile: the map is not exact.
	Running bool
	// Progress hears how many bytes of memory are done, if not nil. It is
	// called every now and then by one goroutine at a time, and must not block.
	// Comparing pages with each other comes after the last call.
	Progress func(done, total uint64)
}

// PassStats tells what a pass did and where its time went.
type PassStats struct {
	// Steps are those taken, in their order.
	Steps []StepStats
	// Hashed, Digested and Read are bytes of memory that went through XXH3 and
	// BLAKE3, and bytes of blocks that were read.
	Hashed, Digested, Read uint64
	// Compared counts comparisons of pages with each other.
	Compared uint64
	// Refuted counts recorded names that were wrong, in pages.
	Refuted uint64
	// Unreadable counts reads of blocks that failed: their pages got no name
	// from that step.
	Unreadable uint64
	Workers    int
	Took       time.Duration
}

// StepStats is the share of one step.
type StepStats struct {
	Step Steps
	// Named is the memory it named, in bytes.
	Named uint64
	// Time is the sum over all workers.
	Time time.Duration
}

// Sizes of the work. A unit is what a worker takes at a time; a frame is what
// goes through all steps before the next, so that it stays in a cache.
const (
	framePages = memory.LargeFrameSize / memory.PageSize
	unitPages  = 8 * framePages
)

// unit is a row of pages of one region.
type unit struct{ region, first, n int }

// units cuts memory into pieces, all aligned to 64 pages of their region.
func (m *Map) units() []unit {
	var all []unit
	for i := range m.regions {
		pages := len(m.regions[i].names)
		for first := 0; first < pages; first += unitPages {
			all = append(all, unit{i, first, min(unitPages, pages-first)})
		}
	}
	return all
}

// Run does the pass. It fails when the context ends, with its cause, or when
// the host does not say which pages are populated.
func (p *Pass) Run(ctx context.Context) (*Map, error) {
	start := time.Now()
	r := p.begin()
	workers, err := r.work(ctx)
	if err != nil {
		return nil, fmt.Errorf("name pages: %w", err)
	}
	if r.steps&StepDuplicates != 0 {
		if err := r.findDuplicates(ctx, workers); err != nil {
			return nil, fmt.Errorf("name duplicates: %w", err)
		}
	}
	r.m.stats = joinStats(r.steps, workers, time.Since(start))
	return r.m, nil
}

// passRun is one run of a pass.
type passRun struct {
	*Pass
	m      *Map
	steps  Steps
	units  []unit
	count  int // of workers
	proven Name
	// indexed are the layers with an index, immutable ones first.
	indexed []LayerID
	// left[region] has a bit for each page that the last step compares; its
	// XXH3-64 stands in the map in place of a name until then.
	left [][]uint64
}

func (p *Pass) begin() *passRun {
	r := &passRun{Pass: p, m: newMap(p.Space, p.Layers), steps: p.Steps & AllSteps}
	if p.Steps == 0 {
		r.steps = AllSteps
	}
	r.m.exact = !p.Running
	r.m.whole = r.steps|StepProven|StepRecorded == AllSteps
	if r.m.exact {
		r.proven = provenBit
	}
	r.units = r.m.units()
	r.count = p.Workers
	if r.count <= 0 {
		r.count = runtime.NumCPU()
	}
	r.count = max(1, min(r.count, len(r.units)))
	for _, immutable := range []bool{true, false} {
		for i, l := range p.Layers {
			if l.Index != nil && l.Immutable == immutable {
				r.indexed = append(r.indexed, LayerID(i))
			}
		}
	}
	for i := range r.m.regions {
		r.left = append(r.left, make([]uint64, len(r.m.regions[i].populated)))
	}
	return r
}

// work lets the workers name all units. It returns them with what they counted.
func (r *passRun) work(ctx context.Context) ([]*worker, error) {
	var mu sync.Mutex // guards done
	var done uint64
	workers := make([]*worker, r.count)
	for i := range workers {
		workers[i] = newWorker(r)
	}
	err := r.parallel(ctx, len(r.units), func(w, i int) error {
		u := r.units[i]
		if err := workers[w].unit(ctx, u); err != nil {
			return err
		}
		if r.Progress != nil {
			mu.Lock()
			defer mu.Unlock()
			done += uint64(u.n) * memory.PageSize
			r.Progress(done, r.Space.Size())
		}
		return nil
	})
	return workers, err
}

// parallel calls do with every number below n, on as many goroutines as there
// are workers, until one call fails or the context ends.
func (r *passRun) parallel(ctx context.Context, n int, do func(worker, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range r.count {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := do(w, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}

// joinStats adds up what the workers counted.
func joinStats(steps Steps, workers []*worker, took time.Duration) PassStats {
	s := PassStats{Workers: len(workers), Took: took}
	for i := range stepCount {
		if steps&(1<<i) == 0 {
			continue
		}
		step := StepStats{Step: 1 << i}
		for _, w := range workers {
			step.Named += w.named[i] * memory.PageSize
			step.Time += w.time[i]
		}
		s.Steps = append(s.Steps, step)
	}
	for _, w := range workers {
		s.Hashed += w.hashed * memory.PageSize
		s.Digested += w.digested * memory.PageSize
		s.Read += w.blocks.read
		s.Compared += w.compared
		s.Refuted += w.refuted
		s.Unreadable += w.blocks.failed
	}
	return s
}

// index returns the place of a step in the order.
func (s Steps) index() int { return bits.TrailingZeros8(uint8(s)) }
