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
		if w := &p.watches[i]; count.used() == count.vouched() && !w.armed {
			*w = watch{activity: w.activity}
			continue
		}
		if !refreshed {
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
	state, why, whole := p.frames.At(frame.Start)
	names := count.used() > count.vouched()
	switch {
	case !whole || !p.collapsible(why):
		// It cannot be large. Single pages are armed, which breaks nothing.
		w.armed = false
		if !names || !p.due(w, now) {
			return names, nil
		}
		return false, p.byPages(frame, w)
	case state == memory.FrameEmpty:
		// What is not populated has no bytes to prove a name with.
		w.armed = false
		return names, nil
	case count.used() == 0:
		// The last name has gone: let the frame be large again without us.
		w.armed = false
		return false, p.tracker.Disarm(frame)
	case state == memory.FrameLarge && !names:
		return false, nil
	}
	if !p.still(frame, w, now, state, why) {
		return true, nil
	}
	if p.left.read <= p.proof.read {
		return true, nil
	}
	if state == memory.FrameSmall {
		return p.makeLarge(frame, w)
	}
	return false, p.byFrame(frame, w)
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
	if w.armed && state == memory.FrameSmall && !w.broken {
		// A write broke it: it was not as quiet as it looked.
		w.broken, w.hashed, w.since = true, false, now
		w.patience = min(w.patience+1, mostPatience)
		return false
	}
	if w.hashed && !p.due(w, now) {
		return false
	}
	if why&memory.ReasonPartial != 0 {
		return p.due(w, now)
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
		w.patience = min(w.patience+1, mostPatience)
	}
	w.hash, w.hashed, w.since = hash, true, now
	// Without a time to wait one look is enough.
	return p.policy.Quiet == 0
}

// byFrame arms a large frame whole and proves the names in it.
func (p *Prover) byFrame(frame memory.Range, w *watch) error {
	if err := p.tracker.Arm(frame); err != nil {
		return p.passOver(w, err)
	}
	w.armed, w.broken = true, false
	err := p.proof.prove(frame)
	p.settled(frame, w)
	return p.readable(err)
}

// byPages arms the pages of a small frame that have names to prove, and proves
// them.
func (p *Prover) byPages(frame memory.Range, w *watch) error {
	if err := p.table.provisional(frame, p.tracker.Arm); err != nil {
		return p.passOver(w, err)
	}
	err := p.proof.prove(frame)
	p.settled(frame, w)
	return p.readable(err)
}

// makeLarge makes a small frame large again, arms it whole and proves its names
// anew: collapsing makes all of it count as written.
func (p *Prover) makeLarge(frame memory.Range, w *watch) (waiting bool, err error) {
	if p.left.collapses <= 0 {
		return true, nil
	}
	p.left.collapses--
	// What was written by now has no proven name any more; the others keep
	// theirs as hints.
	if err := p.tracker.settle(frame); err != nil {
		return true, err
	}
	p.table.demote(frame)
	switch err := p.frames.Collapse(frame.Start, p.policy.Fill); {
	case err == nil:
		return false, p.byFrame(frame, w)
	case errors.Is(err, memory.ErrFrameBusy):
		w.since = p.clock()
		return true, nil
	case errors.Is(err, memory.ErrFrameHeld), errors.Is(err, memory.ErrNoHugePage), errors.Is(err, memory.ErrFrameFixed):
		w.armed = false
		return false, p.byPages(frame, w)
	default:
		return true, err
	}
}

// settled notes that the frame's names have been looked after.
func (p *Prover) settled(frame memory.Range, w *watch) {
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

// readable tells once that a layer cannot be read. The guest has the same
// trouble, and hears of it by itself.
func (p *Prover) readable(err error) error {
	if err != nil && !p.told {
		p.told = true
		p.log.Warn("a disk layer cannot be read to prove names", "err", err)
	}
	return nil
}
