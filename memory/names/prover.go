package names

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// ProverPolicy says how fast names are proven. Arming costs the guest a fault
// for each page that it writes later, and a large frame; hashing and reading
// blocks cost the host time. All are bounded for each step.
type ProverPolicy struct {
	Interval time.Duration // between steps
	// Quiet is how long a frame must have been left alone before it is armed.
	// After each time that this was too short it is doubled for that frame.
	Quiet    time.Duration
	Window   int   // frames looked at in a step
	Hashes   int   // frames hashed in a step, at most
	Collapse int   // frames made large in a step, at most
	Fill     int   // missing pages of a frame that may be populated for it
	Read     int64 // bytes of layers read in a step, at most; a frame goes over by 2 MiB
	// BusyRest is how many times the length of a step the prover rests after it
	// while the guest does I/O or computes: names are then not what it waits for.
	BusyRest int
	// WithLog arms through kvm-log and kvm-ring too. While they are armed KVM
	// maps what the guest writes by small pages, so that names cost more than
	// they bring unless somebody tracks writes anyway.
	WithLog bool
}

// DefaultProverPolicy looks at 1 GiB in each tenth of a second, hashes up to 16
// MiB of it, which takes two hundredths of a core, and reads up to 4 MiB from
// layers: 300 MiB that were read are proven in 8 s.
func DefaultProverPolicy() ProverPolicy {
	return ProverPolicy{
		Interval: 100 * time.Millisecond, Quiet: time.Second,
		Window: 512, Hashes: 8, Collapse: 2, Fill: 64, Read: 4 << 20, BusyRest: 50,
	}
}

const (
	// longestRest is how much slower the prover steps when it has nothing to do.
	longestRest = 16
	// mostPatience bounds the doubling of Quiet for a frame: 256 times.
	mostPatience = 8
	// busyShare is what is left of the budgets while the guest is busy.
	busyShare = 4
	// busyCores is how much of a core the process takes besides the prover when
	// its guest counts as busy.
	busyCores = 0.5
)

// FrameBook is what the prover needs of [memory.Frames].
type FrameBook interface {
	Refresh(r memory.Range) error
	At(gpa memory.GPA) (memory.FrameState, memory.FrameReasons, bool)
	Collapse(gpa memory.GPA, fill int) error
}

// Prover proves provisional names where memory is quiet, keeps the frames that
// it armed large, and drops names of pages that were written.
//
//	                   I/O                    changed
//	                 +-----+                 +------+
//	                 v     |                 v      |
//	names to prove: waiting -----> large: hashed ---+--> armed whole, compared
//	                   |                                     |
//	                   |                                     | a write breaks it
//	                   |                                     v
//	                   +--------> small: hashed ----> collapsed, armed, compared
//	                   |
//	                   +--------> cannot be large: armed by pages, compared
//
// Whether a large frame that is not armed is being written no tracker can tell;
// so the frame is hashed twice, some time apart. The hash only saves frames from
// being broken for nothing: that a name is true never rests on it.
//
// Step and Run are called by one goroutine, Settle by any.
type Prover struct {
	table   *Table
	space   *memory.Space
	tracker *Watched
	frames  FrameBook
	policy  ProverPolicy
	log     *slog.Logger
	now     func() time.Time
	used    func() time.Duration // CPU time of the process so far
	began   time.Time

	proof   *proof
	watches []watch
	cursor  int    // number of the frame where the next window begins
	seen    uint64 // names recorded when the last step began
	busy    bool   // the guest did I/O before the last step, or computed
	loaded  bool   // it computed
	// Told once: a layer cannot be read, a frame cannot be made large.
	toldRead, toldLarge bool

	left budget
}

// budget is what a step may still do.
type budget struct {
	hashes, collapses int
	read              int64
}

// watch is what the prover remembers of a frame.
type watch struct {
	activity uint32        // of the frame's count, when it was looked at
	patience uint8         // Quiet is doubled so many times
	tracked  bool          // the prover armed pages of it, or all
	whole    bool          // it did so while the frame was large, and no write was seen
	hashed   bool          // hash is from since
	hash     uint64        // of the frame's bytes
	since    time.Duration // since when nothing changed, on the prover's clock
}

// hurried makes the prover wait longer for a frame the next time.
func (w *watch) hurried() { w.patience = min(w.patience+1, mostPatience) }

// NewProver returns the prover of a table. Without a book of frames, nil, it arms
// single pages.
func NewProver(s *memory.Space, t *Table, w *Watched, frames FrameBook, p ProverPolicy, log *slog.Logger) *Prover {
	return &Prover{
		table: t, space: s, tracker: w, frames: frames, policy: p, log: log, now: time.Now, used: processTime,
		proof: newProof(t, s), watches: make([]watch, len(t.frames)),
	}
}

// Active reports whether the prover proves anything with this tracker. If not,
// names stay provisional for ever.
func (p *Prover) Active() bool {
	switch p.tracker.Kind() {
	case memory.TrackerWPAsync:
		return true
	case memory.TrackerNone:
		return false
	}
	return p.policy.WithLog
}

// Run steps until ctx ends, ever more rarely while there is nothing to do.
func (p *Prover) Run(ctx context.Context) {
	if !p.Active() {
		return
	}
	rest := time.Duration(1)
	timer := time.NewTimer(p.policy.Interval)
	defer timer.Stop()
	told := false
	last, used := p.now(), p.used()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		began := p.now()
		p.loaded = float64(p.used()-used) >= busyCores*float64(began.Sub(last))
		waiting, err := p.Step(ctx)
		switch {
		case err != nil:
			rest = min(rest*2, longestRest)
			if !told {
				told = true
				p.log.Warn("pages cannot be proven to equal blocks for now", "err", err)
			}
		case waiting:
			rest, told = 1, false
		default:
			rest, told = min(rest*2, longestRest), false
		}
		last, used = p.now(), p.used()
		timer.Reset(max(p.policy.Interval*rest, p.resting()*last.Sub(began)))
	}
}

// processTime is the CPU time of all threads of the process, vCPUs included.
func processTime() time.Duration {
	var u unix.Rusage
	if unix.Getrusage(unix.RUSAGE_SELF, &u) != nil {
		return 0 // never: the address and the number are good
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// resting is how many times the length of a step the rest is that follows it.
func (p *Prover) resting() time.Duration {
	if p.busy {
		return time.Duration(p.policy.BusyRest)
	}
	return memory.KeeperShare
}

// Settle drops the names of pages that were written since they were proven. On
// a paused VM whose devices are drained every proven name is true afterwards.
// After an error too, but fewer are left.
func (p *Prover) Settle(ctx context.Context) error {
	var errs []error
	for _, r := range p.space.Regions() {
		const step = 1 << 30
		for at := r.Start; at < r.End(); at += step {
			part := memory.Range{Start: at, Size: min(step, uint64(r.End()-at))}
			if err := ctx.Err(); err != nil {
				rest := memory.Range{Start: at, Size: uint64(r.End() - at)}
				p.table.demote(rest)
				errs = append(errs, err)
				break
			}
			errs = append(errs, p.settle(part))
		}
	}
	return errors.Join(errs...)
}

// settle asks the tracker about the frames of r that have proven names.
func (p *Prover) settle(r memory.Range) error {
	var errs []error
	var run memory.Range
	flush := func() {
		if run.Size > 0 {
			errs = append(errs, p.tracker.settle(run))
		}
		run = memory.Range{}
	}
	p.eachFrame(r, func(frame memory.Range, n int) {
		switch {
		case p.table.count(n).vouched() == 0:
		case run.Size > 0 && (run.End() == frame.Start || p.joins()):
			run.Size = uint64(frame.End() - run.Start)
		default:
			flush()
			run = frame
		}
	})
	flush()
	return errors.Join(errs...)
}

// joins reports whether one call for many frames with gaps is cheaper than many:
// KVM's logs are read by whole slots.
func (p *Prover) joins() bool { return p.tracker.Kind() != memory.TrackerWPAsync }

// eachFrame calls f for every large frame that r touches, cut to the region.
func (p *Prover) eachFrame(r memory.Range, f func(frame memory.Range, n int)) {
	for at := r.Start &^ (memory.LargeFrameSize - 1); at < r.End(); at += memory.LargeFrameSize {
		page, ok := p.table.page(at)
		if !ok {
			continue
		}
		f(p.frame(int(page>>frameShift)), int(page>>frameShift))
	}
}

// frame returns the memory of the nth frame: 2 MiB, or less at a region's end.
func (p *Prover) frame(n int) memory.Range {
	start := p.table.gpa(uint32(n) << frameShift)
	for _, r := range p.space.Regions() {
		if r.Contains(start, 1) {
			return memory.Range{Start: start, Size: min(memory.LargeFrameSize, uint64(r.End()-start))}
		}
	}
	return memory.Range{Start: start}
}

// Step looks at the next window of frames and does what is due. It reports
// whether names wait to be proven, or frames to be made large.
func (p *Prover) Step(ctx context.Context) (waiting bool, err error) {
	if !p.Active() {
		return false, nil
	}
	p.proof.read = 0
	p.left = budget{p.policy.Hashes, p.policy.Collapse, p.policy.Read}
	recorded := p.table.stats.recorded.Load()
	if p.busy = p.loaded || recorded != p.seen; p.busy {
		p.left.hashes /= busyShare
		p.left.read /= busyShare
	}
	p.seen = recorded
	for left := min(p.policy.Window, len(p.watches)); left > 0 && ctx.Err() == nil; {
		p.cursor %= len(p.watches)
		window := p.window(min(left, len(p.watches)-p.cursor))
		if err := p.settle(window); err != nil {
			return true, err
		}
		n := int((window.Size + memory.LargeFrameSize - 1) / memory.LargeFrameSize)
		w, err := p.look(ctx, window, n)
		waiting = waiting || w
		if err != nil {
			return true, fmt.Errorf("prove names in the frames at %s: %w", window.Start, err)
		}
		p.cursor += n
		left -= n
	}
	return waiting, nil
}

// window returns the memory of up to n frames from the cursor, of one region.
func (p *Prover) window(n int) memory.Range {
	first := p.frame(p.cursor)
	for _, r := range p.space.Regions() {
		if r.Contains(first.Start, 1) {
			return memory.Range{Start: first.Start, Size: min(uint64(n)*memory.LargeFrameSize, uint64(r.End()-first.Start))}
		}
	}
	return first
}
