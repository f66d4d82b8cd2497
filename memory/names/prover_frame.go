package names

import (
	"context"
	"errors"
	"time"

	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
)

// look does what is due for the n frames of a window that the prover has to do
// with, and reports whether more is to come.
func (p *Prover) look(ctx context.Context, window memory.Range, n int) (waiting bool, err error) {
	refreshed := false
	for i := p.cursor; i < p.cursor+n && ctx.Err() == nil; i++ {
		count := p.table.count(i)
		if w := &p.watches[i]; count.used() == count.vouched() && !w.tracked {
			*w = watch{activity: w.activity}
			continue
		}
		if !refreshed && p.frames != nil {
			if err := p.frames.Refresh(window); err != nil {
				return true, err
			}
			refreshed = true
		}
		w, err := p.lookAt(i)
		waiting = waiting || w
		if err != nil {
			return true, err
		}
	}
	return waiting, nil
}

// lookAt does what is due for one frame.
func (p *Prover) lookAt(n int) (waiting bool, err error) {
	w, count := &p.watches[n], p.table.count(n)
	now := p.clock()
	if w.activity != count.activity() {
		w.activity, w.hashed, w.since = count.activity(), false, now
		return true, nil
	}
	frame := p.frame(n)
	var state memory.FrameState
	var why memory.FrameReasons
	whole := false
	if p.frames != nil {
		state, why, whole = p.frames.At(frame.Start)
	}
	names := count.used() > count.vouched()
	switch {
	case count.used() == 0:
		// The last name has gone: the frame may be large again without us.
		*w = watch{activity: w.activity}
		return false, p.tracker.Disarm(frame)
	case why&memory.ReasonRemap != 0:
		// To prove what is mapped or missing would bring all of it into memory.
		return false, nil
	case !names && (state == memory.FrameLarge || !whole || !p.collapsible(why)):
		return false, nil
	case p.left.read <= p.proof.read:
		return true, nil
	case !whole || !p.collapsible(why):
		// It cannot be large. Single pages are armed, which breaks nothing.
		if !p.due(w, now) {
			return true, nil
		}
		return false, p.byPages(frame, w)
	case !p.still(frame, w, now, state, why):
		return true, nil
	case state == memory.FrameSmall:
		return p.makeLarge(frame, w, names)
	case state == memory.FrameLarge:
		return false, p.byFrame(frame, w)
	}
	return false, nil // empty: I/O populates it first
}

// clock is the time since the prover's first look.
func (p *Prover) clock() time.Duration {
	if p.began.IsZero() {
		p.began = p.now()
	}
	return p.now().Sub(p.began)
}

// due reports whether the frame has been left alone for long enough.
func (p *Prover) due(w *watch, now time.Duration) bool {
	return now-w.since >= p.policy.Quiet<<w.patience
}

// collapsible reports whether a frame that is small for these reasons may be
// made large by the prover, and arming whole frames means anything at all.
func (p *Prover) collapsible(why memory.FrameReasons) bool {
	return p.tracker.Kind() == memory.TrackerWPAsync &&
		p.space.Config().HugePages != memory.HugePagesOff &&
		why&^(memory.ReasonTracking|memory.ReasonPartial) == 0
}

// still reports whether nobody has written to a frame for as long as it must be
// quiet. Frames that lack pages are not read, since reading would populate them.
func (p *Prover) still(frame memory.Range, w *watch, now time.Duration, state memory.FrameState, why memory.FrameReasons) bool {
	if w.whole && state == memory.FrameSmall {
		// A write broke it: it was not as quiet as it looked.
		w.whole, w.hashed, w.since = false, false, now
		w.hurried()
		return false
	}
	if why&memory.ReasonPartial != 0 || p.policy.Quiet == 0 {
		return p.due(w, now)
	}
	if w.hashed && !p.due(w, now) {
		return false
	}
	if p.left.hashes <= 0 {
		return false
	}
	p.left.hashes--
	bytes, err := p.space.View(frame.Start, frame.Size)
	if err != nil {
		return false
	}
	hash := xxh3.Hash(bytes)
	if w.hashed && w.hash == hash {
		return true
	}
	if w.hashed {
		w.hurried()
	}
	w.hash, w.hashed, w.since = hash, true, now
	return false
}

// byFrame arms a large frame whole and proves the names in it.
func (p *Prover) byFrame(frame memory.Range, w *watch) error {
	if err := p.tracker.Arm(frame); err != nil {
		return p.passOver(w, err)
	}
	w.tracked, w.whole = true, true
	p.prove(frame, w)
	return nil
}

// byPages arms the pages of a small frame that have names to prove, and proves
// them.
func (p *Prover) byPages(frame memory.Range, w *watch) error {
	w.tracked, w.whole = true, false
	if err := p.table.provisional(frame, p.tracker.Arm); err != nil {
		return p.passOver(w, err)
	}
	p.prove(frame, w)
	return nil
}

// makeLarge makes a small frame large again, arms it whole and proves its names
// anew: collapsing makes all of it count as written.
func (p *Prover) makeLarge(frame memory.Range, w *watch, names bool) (waiting bool, err error) {
	if p.left.collapses <= 0 {
		return true, nil
	}
	p.left.collapses--
	// What was written by now loses its name; the others keep theirs as hints.
	if err := p.tracker.settle(frame); err != nil {
		return true, err
	}
	err = p.frames.Collapse(frame.Start, p.policy.Fill)
	switch {
	case err == nil:
		return false, p.byFrame(frame, w)
	case errors.Is(err, memory.ErrFrameHeld):
		// Nothing was changed yet.
	case errors.Is(err, memory.ErrFrameBusy):
		p.table.demote(frame)
		w.hashed, w.since = false, p.clock()
		return true, nil
	default:
		p.table.demote(frame)
		names = true
		if !p.toldLarge {
			p.toldLarge = true
			p.log.Warn("memory that is compared with disks stays mapped by small pages for now", "err", err)
		}
	}
	w.hurried()
	w.hashed, w.since = false, p.clock()
	if !names {
		return false, nil
	}
	return false, p.byPages(frame, w)
}

// prove proves the names of a frame whose pages are armed. A layer that cannot
// be read is told of once: the guest has the same trouble and hears of it.
func (p *Prover) prove(frame memory.Range, w *watch) {
	if err := p.proof.prove(frame); err != nil {
		w.hurried()
		if !p.toldRead {
			p.toldRead = true
			p.log.Warn("a disk cannot be read to compare memory with it", "err", err)
		}
	}
	if page, ok := p.table.page(frame.Start); ok {
		w.activity = p.table.count(int(page >> frameShift)).activity()
	}
	w.hashed, w.since = false, p.clock()
}

// passOver forgives a frame that changed its size while it was looked at.
func (p *Prover) passOver(w *watch, err error) error {
	if !errors.Is(err, memory.ErrPartOfLargeFrame) {
		return err
	}
	w.hashed, w.since = false, p.clock()
	return nil
}
