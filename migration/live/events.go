package live

import (
	"sync"
	"time"
)

// events tells how far a migration is: at once when a phase or a round begins,
// and else not too often.
type events struct {
	hear  func(Event)
	began time.Time

	mu   sync.Mutex
	last Event // what stays true until it changes
	sent time.Time
	// Of the rate: when it was measured, and the bytes by then.
	rateAt    time.Time
	rateBytes uint64
}

// eventInterval is how often progress is told.
const eventInterval = 200 * time.Millisecond

func (e *events) init(hear func(Event)) {
	e.hear, e.began = hear, time.Now()
	e.rateAt = e.began
}

// begin sets the name of the VM.
func (e *events) begin(vm string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.last.VM = vm
}

// tell changes what is known and tells it, at once or when it is time.
func (e *events) tell(now bool, sent Traffic, change func(*Event)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	change(&e.last)
	if e.hear == nil || !now && time.Since(e.sent) < eventInterval {
		return
	}
	if since := time.Since(e.rateAt); since >= eventInterval {
		e.last.Rate = uint64(float64(sent.Total-e.rateBytes) / since.Seconds())
		e.rateAt, e.rateBytes = time.Now(), sent.Total
	}
	e.last.Elapsed, e.last.Sent = time.Since(e.began), sent
	e.sent = time.Now()
	e.hear(e.last)
}

// total returns what the round has to do.
func (e *events) total() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.last.Total
}

// phase begins a phase.
func (s *sender) phase(p Phase) {
	s.events.tell(true, s.sent(), func(e *Event) { e.Phase, e.Done, e.Total = p, 0, 0 })
}

// progress tells of a part of what is done in this phase or round.
func (s *sender) progress(done, total uint64) {
	s.events.tell(false, s.sent(), func(e *Event) { e.Done, e.Total = done, total })
}

// emit tells the end.
func (s *sender) emit(end Event) {
	s.events.tell(true, s.sent(), func(e *Event) { e.Phase, e.Error = end.Phase, end.Error })
}

// sent returns what went over the wire so far.
func (s *sender) sent() Traffic {
	b := &s.traffic.bytes
	return Traffic{
		Total: s.flow.out.Load(), Back: s.flow.in.Load(),
		Zero: b[kindZero].Load(), Named: b[kindNamed].Load(), Duplicate: b[kindDuplicate].Load(),
		Raw: b[kindRaw].Load(), Zstd: b[kindZstd].Load(), Asked: b[kindAsked].Load(), State: b[kindState].Load(), Disk: b[kindDisk].Load(),
	}
}

// count writes into the report what was counted.
func (s *sender) count() {
	p := &s.traffic.pages
	s.report.Sent = s.sent()
	s.report.Rounds = s.round
	s.report.Pages = Pages{
		Zero: p[kindZero].Load(), Named: p[kindNamed].Load(), Duplicate: p[kindDuplicate].Load(),
		Raw: p[kindRaw].Load(), Zstd: p[kindZstd].Load(), Asked: p[kindAsked].Load(),
	}
}
