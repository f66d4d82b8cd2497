package live

import (
	"errors"
	"time"

	"ditto.vm/memory"
)

// How the guest is slowed down when it writes faster than pages are sent.
const (
	firstThrottle = 20 // percent
	throttleStep  = 10
	maxThrottle   = 99
	// slowProgress is the share of what was left a round before that is too much
	// to be left now; after so many such rounds in a row the guest is throttled.
	slowProgress = 0.7
	slowRounds   = 2
	// switchCost is what the pause takes besides pages: state, disks, and the way
	// there and back a few times.
	switchCost = 20 * time.Millisecond
)

// ErrTimeout is wrapped by the error of a migration that took too long.
var ErrTimeout = errors.New("pre-copy took too long")

// minSample is how many bytes a round sends at least to tell how fast the way is.
const minSample = 1 << 20

// convergence is the progress of the rounds, from which it is predicted how long
// the guest would stand still.
type convergence struct {
	left, before uint64  // pages to be sent, now and a round before
	perPage      float64 // bytes on the wire of a page that travels as bytes
	speed        float64 // bytes a second on the wire, 0 as long as it is not known
	pages        float64 // pages a second, until then
	slow         int     // rounds in a row
	throttle     int     // percent
}

// expected predicts the downtime, in which pages travel as bytes.
func (c *convergence) expected() time.Duration {
	seconds := 0.0
	switch {
	case c.speed > 0:
		seconds = float64(c.left) * c.perPage / c.speed
	case c.pages > 0:
		seconds = float64(c.left) / c.pages
	}
	return switchCost + time.Duration(seconds*float64(time.Second))
}

// sample is what a round sent.
type sample struct {
	pages, bytes uint64
	took         time.Duration
	left         uint64 // pages that it left
}

// ended notes a round. The way may have become slower, or the round was one of
// names and waited for disks: half of that is believed.
func (c *convergence) ended(s sample) {
	seconds := max(s.took.Seconds(), 1e-6)
	c.pages = float64(s.pages) / seconds
	if speed := float64(s.bytes) / seconds; s.bytes >= minSample {
		c.speed = max(speed, (c.speed+speed)/2)
	}
	c.before, c.left = c.left, s.left
	if float64(c.left) > slowProgress*float64(c.before) && c.before > 0 {
		c.slow++
	} else {
		c.slow = 0
	}
}

// slower returns what to throttle the guest by from now on.
func (c *convergence) slower() int {
	switch {
	case c.slow < slowRounds:
	case c.throttle == 0:
		c.throttle, c.slow = firstThrottle, 0
	default:
		c.throttle, c.slow = min(c.throttle+throttleStep, maxThrottle), 0
	}
	return c.throttle
}

// precopy sends rounds until the guest may stand still. What is left is in
// s.dirty.
func (s *sender) precopy() error {
	s.phase(PhaseCopy)
	began := time.Now()
	if s.o.Timeout > 0 {
		s.deadline = began.Add(s.o.Timeout)
	}
	var c convergence
	for {
		roundBegan, pages, bytes := time.Now(), s.mem.Size()>>memory.PageShift, s.flow.out.Load()
		var err error
		if s.round == 0 {
			err = s.firstRound()
		} else {
			pages = s.dirty.Count()
			err = s.nextRound(s.dirty, s.recorded != nil)
		}
		if err != nil {
			return err
		}
		if err := s.collect(); err != nil {
			return err
		}
		took := time.Since(roundBegan)
		c.perPage = s.traffic.perPage()
		c.ended(sample{pages: pages, bytes: s.flow.out.Load() - bytes, took: took, left: s.dirty.Count() + s.diskPages()})
		s.told(c, took)
		switch {
		case s.o.Postcopy && c.expected() > s.o.Downtime:
			s.report.Mode = modePostcopy
			return nil
		case c.expected() <= s.o.Downtime:
			return nil
		case s.o.Timeout > 0 && time.Since(began) > s.o.Timeout:
			return s.tooLong(c)
		case !s.o.NoThrottle && c.slower() != s.report.Throttle:
			s.report.Throttle = c.throttle
			s.vm.Throttle(c.throttle)
		}
	}
}

// perPage returns what a page takes on the wire that travels as bytes.
func (t *traffic) perPage() float64 {
	pages := t.pages[kindRaw].Load() + t.pages[kindZstd].Load()
	if pages == 0 {
		return memory.PageSize
	}
	return float64(t.bytes[kindRaw].Load()+t.bytes[kindZstd].Load()) / float64(pages)
}

// collect makes s.dirty what has to be sent next. Pages written from here on are
// collected the next time.
func (s *sender) collect() error {
	s.dirty.Clear()
	if err := s.vm.Collect(s.dirty); err != nil {
		return s.cause(err)
	}
	s.asked.Clear()
	for r := range s.wanted.Runs() {
		s.asked.Add(r.Start, r.Size)
		s.dirty.Add(r.Start, r.Size)
	}
	for r := range s.late.Runs() {
		s.dirty.Add(r.Start, r.Size)
	}
	s.wanted.Clear()
	s.late.Clear()
	return nil
}

// told tells how far the rounds are.
func (s *sender) told(c convergence, took time.Duration) {
	s.report.Expected = c.expected()
	s.events.tell(true, s.sent(), func(e *Event) {
		e.Left, e.Expected, e.Throttle = c.left<<memory.PageShift, c.expected(), s.report.Throttle
		e.DirtyRate = uint64(float64(c.left<<memory.PageShift) / max(took.Seconds(), 1e-6))
	})
}

// tooLong does what the policy says.
func (s *sender) tooLong(c convergence) error {
	switch s.o.OnTimeout {
	case TimeoutStop:
		s.report.Mode = modeStop
		return nil
	case TimeoutPostcopy:
		s.report.Mode = modePostcopy
		return nil
	default:
		return &TimeoutError{After: s.o.Timeout, Left: c.left << memory.PageShift, Expected: c.expected()}
	}
}

// TimeoutError says how far pre-copy came.
type TimeoutError struct {
	After time.Duration
	// Left and Expected are what the next round had to send, in bytes, and the
	// downtime expected; 0 in the middle of a round.
	Left     uint64
	Expected time.Duration
}

// Error implements error.
func (e *TimeoutError) Error() string {
	if e.Expected == 0 {
		return ErrTimeout.Error() + ": memory was not sent once within " + e.After.String() + "; allow more time, or let the guest be stopped"
	}
	return ErrTimeout.Error() + ": after " + e.After.String() + " the guest would have to stand still for " +
		e.Expected.Round(time.Millisecond).String() + "; allow more downtime or time, or let it be stopped"
}

// Unwrap returns [ErrTimeout].
func (e *TimeoutError) Unwrap() error { return ErrTimeout }
