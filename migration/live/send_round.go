package live

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// batchPages is how many pages a worker takes at a time.
const batchPages = wire.MaxBatch

// batches cuts a set into lists of ranges that have batchPages pages each, in
// ascending order.
func batches(set *memory.PageSet) [][]memory.Range {
	var all [][]memory.Range
	var now []memory.Range
	room := uint64(batchPages)
	for r := range set.Runs() {
		for r.Size > 0 {
			n := min(r.Size>>memory.PageShift, room)
			now = append(now, memory.Range{Start: r.Start, Size: n << memory.PageShift})
			r.Start, r.Size = r.Start+memory.GPA(n<<memory.PageShift), r.Size-n<<memory.PageShift
			if room -= n; room == 0 {
				all, now, room = append(all, now), nil, batchPages
			}
		}
	}
	if len(now) > 0 {
		all = append(all, now)
	}
	return all
}

// firstRound sends all of memory: what is not populated as zeros, without looking
// at it.
func (s *sender) firstRound() error {
	populated := s.mem.NewPageSet()
	for _, r := range s.mem.Regions() {
		err := s.mem.Populated(r.Range, func(r memory.Range) { populated.Add(r.Start, r.Size) })
		if err != nil {
			return err
		}
	}
	holes := s.mem.NewPageSet()
	for _, r := range s.mem.Regions() {
		holes.Add(r.Start, r.Size)
	}
	for r := range populated.Runs() {
		holes.Remove(r.Start, r.Size)
	}
	if err := s.beginRound(s.mem.Size()>>memory.PageShift, s.stopped.Load()); err != nil {
		return err
	}
	if err := s.sendWritten(); err != nil {
		return err
	}
	if err := s.sendHoles(holes); err != nil {
		return err
	}
	if err := s.sendPages(populated, s.recorded != nil); err != nil {
		return err
	}
	return s.endRound()
}

// nextRound sends pages again. Whoever collected them has armed them before, so
// that what is written from now on is collected next.
func (s *sender) nextRound(pages *memory.PageSet, names bool) error {
	if err := s.beginRound(pages.Count(), false); err != nil {
		return err
	}
	if err := s.sendWritten(); err != nil {
		return err
	}
	if err := s.sendPages(pages, names); err != nil {
		return err
	}
	return s.endRound()
}

// beginRound says that a round begins.
func (s *sender) beginRound(pages uint64, stopped bool) error {
	s.round++
	s.traffic.roundDone.Store(0)
	s.events.tell(true, s.sent(), func(e *Event) {
		e.Round, e.Done, e.Total = s.round, 0, pages<<memory.PageShift
	})
	return s.say(&wire.Round{Number: uint32(s.round), Stopped: stopped, Pages: pages})
}

// sendHoles sends runs of pages that read as zeros.
func (s *sender) sendHoles(holes *memory.PageSet) error {
	var frame []byte
	runs, pages := 0, uint64(0)
	flush := func() error {
		if runs == 0 {
			return nil
		}
		wire.Finish(frame, 0, wire.TypeZero, 0, 0)
		s.traffic.add(kindZero, pages, len(frame))
		l := s.data[0]
		l.mu.Lock()
		defer l.mu.Unlock()
		runs, pages = 0, 0
		return l.write(frame)
	}
	frame = wire.Begin(frame)
	for r := range holes.Runs() {
		for n := r.Size >> memory.PageShift; n > 0; {
			part := min(n, 1<<30)
			frame = wire.AppendRun(frame, wire.Run{GFN: uint64(r.Start.GFN()), Count: uint32(part)})
			runs, pages, n = runs+1, pages+part, n-part
			r.Start += memory.GPA(part << memory.PageShift)
		}
		if runs >= wire.MaxRuns-4 {
			if err := flush(); err != nil {
				return s.cause(lost(err))
			}
			frame = wire.Begin(frame[:0])
		}
	}
	if err := flush(); err != nil {
		return s.cause(lost(err))
	}
	s.traffic.roundDone.Add(holes.Count())
	return nil
}

// sendPages sends pages by many hands. The limit of bandwidth is for the time in
// which the guest runs.
func (s *sender) sendPages(pages *memory.PageSet, names bool) error {
	todo := batches(pages)
	s.makeWorkers()
	total := s.events.total()
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	err := parallel.Do(s.run, len(s.workers), len(todo), func(ctx context.Context, w, i int) error {
		if s.overdue() {
			return s.putOff(todo[i])
		}
		if err := s.workers[w].send(ctx, todo[i], names); err != nil {
			return err
		}
		s.progress(s.traffic.roundDone.Load()<<memory.PageShift, total)
		return nil
	})
	if err != nil {
		return s.cause(err)
	}
	return nil
}

// overdue says that pre-copy has taken as long as it may.
func (s *sender) overdue() bool {
	return !s.deadline.IsZero() && !s.stopped.Load() && time.Now().After(s.deadline)
}

// putOff leaves pages to be sent later, when it is too late for now, unless the
// migration ends with that.
func (s *sender) putOff(batch []memory.Range) error {
	if s.o.OnTimeout == TimeoutAbort {
		return &TimeoutError{After: s.o.Timeout}
	}
	for _, r := range batch {
		s.late.Add(r.Start, r.Size)
	}
	return nil
}

// makeWorkers makes a worker for each core and each connection.
func (s *sender) makeWorkers() {
	for n := max(len(s.data), min(runtime.NumCPU(), 16)); len(s.workers) < n; {
		s.workers = append(s.workers, newWorker(s, s.data[len(s.workers)%len(s.data)]))
	}
}

// sendBarriers ends the round on every connection.
func (s *sender) sendBarriers() error {
	for _, l := range s.data {
		if l == s.control {
			continue
		}
		if _, err := l.send(&wire.Barrier{Number: uint32(s.round)}); err != nil {
			return s.cause(lost(err))
		}
	}
	return s.say(&wire.RoundEnd{Number: uint32(s.round)})
}

// endRound ends the round and waits until the destination has it in memory; what
// names did not hold for is in s.wanted then.
func (s *sender) endRound() error {
	if err := s.sendBarriers(); err != nil {
		return err
	}
	return s.awaitRound()
}

func (s *sender) awaitRound() error {
	done, err := expect[*wire.RoundDone](s.session)
	if err != nil {
		return err
	}
	if done.Number != uint32(s.round) {
		return fmt.Errorf("the destination ended round %d, this is round %d", done.Number, s.round)
	}
	return nil
}

func (t *traffic) add(k kind, pages uint64, bytes int) {
	t.pages[k].Add(pages)
	t.bytes[k].Add(uint64(bytes))
}
