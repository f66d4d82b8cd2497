package remotemigrate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"ditto.vm/migration/live"
	"ditto.vm/vmm/lend"
)

// ErrConnect is wrapped when the destination cannot be reached.
var ErrConnect = errors.New("the destination cannot be reached")

// Bounds of what a client waits for.
const (
	// againLimit bounds an attempt to ask for the outcome after the user
	// canceled.
	againLimit = 20 * time.Second
	// undoLimit is what a machine gets after a cancel: it may be too late, and
	// the machine then still has to find out what became of it.
	undoLimit = 3 * time.Minute
)

// Dial makes a connection to the destination: a stream socket, whose copy here is
// closed when it is lent.
type Dial func(ctx context.Context) (*os.File, error)

// Call moves the machine whose socket for operations is at path to where dial
// leads. When ctx ends the migration is canceled: before the commit point the
// machine goes on, after it there is a report as if nothing had been canceled.
// events may be nil.
//
// An error that wraps [ErrInDoubt] or [ErrStuck] leaves a machine that stands
// still; with [lend.ErrGone] it has not said what became of it. After all others
// it is as it was.
func Call(ctx context.Context, path string, dial Dial, o Options, events func(live.Event)) (r live.Report, err error) {
	if err := o.Check(); err != nil {
		return r, err
	}
	c := &connector{dial: dial}
	// Behind the commit there is nothing to cancel, and no limit to what is left.
	var committed atomic.Bool
	inner, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	defer context.AfterFunc(ctx, func() {
		if !committed.Load() {
			cancel(context.Cause(ctx))
		}
	})()
	client := lend.Client{Kinds: Kinds(), Answer: c.answer, Grace: undoLimit, Event: func(body json.RawMessage) {
		var e live.Event
		if json.Unmarshal(body, &e) != nil {
			return
		}
		if e.Phase == live.PhaseCommit || e.Phase == live.PhasePull {
			committed.Store(true)
		}
		if events != nil {
			events(e)
		}
	}}
	err = client.Call(inner, path, operation, o, &r)
	return r, err
}

// connector makes the connections that a machine asks for.
type connector struct {
	dial Dial
	made int
}

// answer makes one.
func (c *connector) answer(ctx context.Context, what string, args json.RawMessage) (any, []*os.File, error) {
	if what != askConnect {
		return nil, nil, fmt.Errorf("%w: a migration has no use for %s", lend.ErrProtocol, what)
	}
	var a connectArgs
	if err := json.Unmarshal(args, &a); err != nil {
		return nil, nil, fmt.Errorf("%w: %w", lend.ErrProtocol, err)
	}
	if c.made++; c.made > MaxConnects {
		return nil, nil, fmt.Errorf("%w: more than %d connections", lend.ErrProtocol, MaxConnects)
	}
	if a.Again {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(context.WithoutCancel(ctx), againLimit)
		defer cancel()
	}
	f, err := c.dial(ctx)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", ErrConnect, err)
	}
	return nil, []*os.File{f}, nil
}
