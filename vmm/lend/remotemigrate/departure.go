package remotemigrate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
)

// Departure is a machine's way to other hosts. Its methods may be called from any
// goroutine.
//
//	         Migrate                      committed
//	here ------------> under way ------------------------> gone
//	  ^                  |   | in doubt, or stuck
//	  |   any failure    |   v           Migrate: committed
//	  +------------------+  held ------------------------> gone
//	  ^                      |
//	  +----------------------+ TakeBack, or Migrate: never
type Departure struct {
	source func() live.SourceVM
	log    *slog.Logger

	mu   sync.Mutex // guards what follows
	busy bool
	now  api.Migration // while busy
	held *held         // nil unless the machine stands still
	gone string        // where it went, "" while it is here
	over bool          // it went to another process of this host, under its name
}

// held is a machine that stands still: its disks are given up, and whether it
// runs at the destination is not known here, unless it is certain that it does
// not.
type held struct {
	vm      live.SourceVM
	token   live.Token
	where   string
	err     error
	certain bool
}

// NewDeparture returns what moves the machine that source stands for.
func NewDeparture(source func() live.SourceVM, log *slog.Logger) *Departure {
	return &Departure{source: source, log: log}
}

// Status is how far a migration is, nil if none is under way or in doubt.
func (d *Departure) Status() *api.Migration {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.busy:
		now := d.now
		return &now
	case d.held != nil:
		phase := string(live.PhaseInDoubt)
		if d.held.certain {
			phase = string(live.PhaseFailed)
		}
		return &api.Migration{Phase: phase, Where: d.held.where, Reason: d.held.err.Error()}
	}
	return nil
}

// Gone is where the machine went, "" while it is here. It is known when the
// machine ends.
func (d *Departure) Gone() string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.gone
}

// TakenOver reports whether another process of this host has the machine, and its
// name. It is known when the machine ends.
func (d *Departure) TakenOver() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.over
}

// leaving notes where a machine goes before it is told to end.
type leaving struct {
	live.SourceVM
	d    *Departure
	over bool
}

// Left implements [live.SourceVM].
func (l leaving) Left(where string) {
	l.d.mu.Lock()
	l.d.gone, l.d.over = where, l.over
	l.d.mu.Unlock()
	l.SourceVM.Left(where)
}

// MayRun reports why the machine must not be paused or resumed by hand.
func (d *Departure) MayRun() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	switch {
	case d.busy:
		return fmt.Errorf("it is on its way to %s: %w", d.now.Where, api.ErrWrongState)
	case d.held != nil && !d.held.certain:
		return fmt.Errorf("its migration to %s is in doubt: ask again by the same 'ditto migrate', or make sure that it does not run there and use 'ditto resume --take-back': %w", d.held.where, api.ErrWrongState)
	case d.held != nil:
		return fmt.Errorf("it stands still after its migration to %s failed (%w): use 'ditto resume --take-back': %w", d.held.where, d.held.err, api.ErrWrongState)
	}
	return nil
}

// enter makes this the only migration, and returns what an earlier one left.
func (d *Departure) enter(where string) (*held, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy {
		return nil, fmt.Errorf("%w, to %s", ErrBusy, d.now.Where)
	}
	d.busy = true
	d.now = api.Migration{Phase: string(live.PhaseConnect), Where: where}
	return d.held, nil
}

// leave ends the only migration, which leaves the machine so.
func (d *Departure) leave(h *held) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.busy, d.held = false, h
}

// at notes how far the migration is.
func (d *Departure) at(p live.Phase) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.now.Phase = string(p)
}

// phase is what at noted.
func (d *Departure) phase() live.Phase {
	d.mu.Lock()
	defer d.mu.Unlock()
	return live.Phase(d.now.Phase)
}

// Migrate implements [Mover]. When an earlier migration is in doubt it asks the
// destination first: the machine is gone then, or runs again and is sent, or the
// doubt remains.
func (d *Departure) Migrate(ctx context.Context, dial func(ctx context.Context, again bool) (net.Conn, error), o live.Options) (r live.Report, err error) {
	before, err := d.enter(o.Where)
	if err != nil {
		return r, err
	}
	after := before
	defer func() { d.leave(after) }()
	if before != nil {
		r.Outcome, err = d.settle(ctx, before, dial)
		if err != nil || r.Outcome == live.OutcomeCommitted {
			if err == nil {
				after, r.Token, r.Where = nil, before.token, before.where
			}
			return r, err
		}
		after = nil
	}
	after, r, err = d.send(ctx, dial, o)
	return r, err
}

// send sends the machine, and returns how it stands still if it does.
func (d *Departure) send(ctx context.Context, dial func(ctx context.Context, again bool) (net.Conn, error), o live.Options) (*held, live.Report, error) {
	tell := o.Events
	o.Events = func(e live.Event) {
		d.at(e.Phase)
		if tell != nil {
			tell(e)
		}
	}
	if o.Log == nil {
		o.Log = d.log
	}
	vm := leaving{d.source(), d, o.SameHost}
	r, err := live.Send(ctx, vm, func(ctx context.Context) (net.Conn, error) {
		phase := d.phase()
		return dial(ctx, phase == live.PhaseCommit || phase == live.PhaseInDoubt || phase == live.PhasePull)
	}, o)
	var doubt *live.InDoubtError
	var stuck *live.StuckError
	switch {
	case errors.As(err, &doubt):
		d.log.Error("the migration is in doubt", "where", o.Where, "token", doubt.Token.String(), "err", err)
		return &held{vm: vm, token: doubt.Token, where: o.Where, err: err}, r, err
	case errors.As(err, &stuck):
		d.log.Error("the machine stands still", "where", o.Where, "err", err)
		return &held{vm: vm, token: r.Token, where: o.Where, err: err, certain: true}, r, err
	}
	return nil, r, err
}

// settle asks the destination what became of an earlier migration, and does what
// follows.
func (d *Departure) settle(ctx context.Context, h *held, dial func(ctx context.Context, again bool) (net.Conn, error)) (live.Outcome, error) {
	outcome := live.OutcomeNever
	if !h.certain {
		d.at(live.PhaseInDoubt)
		var err error
		outcome, err = live.AskOutcome(ctx, func(ctx context.Context) (net.Conn, error) { return dial(ctx, true) }, h.token)
		if err != nil {
			return outcome, &live.InDoubtError{Token: h.token, Err: err}
		}
	}
	switch outcome {
	case live.OutcomeCommitted:
		h.vm.Left(h.where)
		return outcome, nil
	case live.OutcomeNever:
		if err := d.reclaim(ctx, h); err != nil {
			return outcome, &live.StuckError{Err: h.err, Cause: err}
		}
		return outcome, nil
	}
	return outcome, &live.InDoubtError{Token: h.token, Err: fmt.Errorf("it says: %v", outcome)}
}

// reclaim lets the machine run here again.
func (d *Departure) reclaim(ctx context.Context, h *held) error {
	if err := h.vm.ReclaimDisks(ctx); err != nil {
		return err
	}
	return h.vm.Resume(ctx)
}

// TakeBack lets a machine run on whose migration is in doubt. Whoever calls it
// knows that it does not run at the destination.
func (d *Departure) TakeBack(ctx context.Context) error {
	h, err := d.enter("")
	if err != nil {
		return fmt.Errorf("%w: %w", err, api.ErrWrongState)
	}
	if h == nil {
		d.leave(nil)
		return fmt.Errorf("no migration of it is in doubt: use 'ditto resume' without --take-back: %w", api.ErrWrongState)
	}
	if err := d.reclaim(ctx, h); err != nil {
		d.leave(h)
		return fmt.Errorf("take back: %w", err)
	}
	d.log.Warn("taken back by hand", "where", h.where, "token", h.token.String())
	d.leave(nil)
	return nil
}
