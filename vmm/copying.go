package vmm

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
)

// copying is what saving and migrating have in common: one of them at a time
// copies memory while the guest writes it, and makes the guest stand still in the
// end.
//
//	begin   what works beside the guest stands still: the prover arms frames,
//	        and so forgets writes that the copy has not collected yet, and the
//	        keeper of large frames makes all of a frame count as written
//	arm     all of memory: what is written from now on is reported
//	stand   the guest stands still, and letGo lets it run again
//	end     gives back what was armed
type copying struct {
	m     *VM
	armed bool // all of memory is

	paused struct { // by this copy
		ours  bool
		calls int // of Pause, then
		since time.Time
	}
	stood time.Duration // how long it was
}

// begin makes this the only copy until done is called.
func (c *copying) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	m := c.m
	ctx, leave, err := m.looks.enter(ctx)
	if err != nil {
		return nil, nil, err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.saving:
		err = fmt.Errorf("the VM is being saved or migrated already: %w", snapshot.ErrBusy)
	case m.away:
		err = errAway
	case m.state != api.Running && m.state != api.Paused:
		err = fmt.Errorf("VM is %s: %w", m.state, api.ErrWrongState)
	}
	if err != nil {
		leave()
		return nil, nil, err
	}
	m.saving = true
	m.holdBackground()
	state.Warm() // the pause is no time to learn
	return ctx, func() {
		if err := c.disarm(); err != nil {
			m.log.Warn("memory may still be tracked", "err", err)
		}
		m.mu.Lock()
		m.saving = false
		m.releaseBackground()
		m.mu.Unlock()
		leave()
	}, nil
}

// arm lets writes be reported from now on. Who is armed already stays so, and
// keeps the names that are proven.
func (c *copying) arm() error {
	c.armed = true
	return c.m.collect(c.m.mem.NewPageSet(), memory.Rearm)
}

// collect adds the pages that were written to a set.
func (m *VM) collect(into *memory.PageSet, mode memory.CollectMode) error {
	for _, r := range m.mem.Regions() {
		if err := m.tracker.Collect(r.Range, into, mode); err != nil {
			return err
		}
	}
	return nil
}

// disarm lets the guest write again without being noticed, where names do not
// need that.
func (c *copying) disarm() error {
	if !c.armed {
		return nil
	}
	c.armed = false
	m := c.m
	if m.naming != nil {
		m.naming.Table().Follow(nil)
		return m.naming.Release()
	}
	var errs []error
	for _, r := range m.mem.Regions() {
		errs = append(errs, m.tracker.Disarm(r.Range))
	}
	return errors.Join(errs...)
}

// errEnded: there is nothing left to be copied.
var errEnded = fmt.Errorf("the guest has ended: %w", api.ErrWrongState)

// whileAlive returns a context that ends with the guest too.
func (c *copying) whileAlive(ctx context.Context) (_ context.Context, done func()) {
	ctx, cancel := context.WithCancelCause(ctx)
	var watching sync.WaitGroup
	watching.Go(func() {
		select {
		case <-c.m.ended:
			cancel(errEnded)
		case <-ctx.Done():
		}
	})
	return ctx, func() {
		cancel(nil)
		watching.Wait()
	}
}

// standAgain is how long a guest gets that is about to restart or to end.
const standAgain = 10 * time.Millisecond

// standFor makes the VM stand still and calls do, unless the guest is about to
// restart or to end: that is no part of any section, and goes first. meanwhile is
// called before it is tried again. do is called with mu held; if it fails, the VM
// runs again.
func (c *copying) standFor(ctx context.Context, do, meanwhile func() error) error {
	for {
		done, err := c.tryStand(ctx, do)
		if done || err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(standAgain):
		}
		if err := meanwhile(); err != nil {
			return err
		}
	}
}

func (c *copying) tryStand(ctx context.Context, do func() error) (done bool, err error) {
	m := c.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := c.stand(ctx); err != nil {
		return false, err
	}
	if m.resetDue.Load() || len(m.requests) > 0 {
		return false, c.letGo(ctx)
	}
	if err := do(); err != nil {
		return false, errors.Join(err, c.letGo(ctx))
	}
	return true, nil
}

// stand makes the VM stand still. Preconditions: mu is held.
func (c *copying) stand(ctx context.Context) error {
	m := c.m
	switch {
	case m.endReason != nil || m.state == api.Stopped:
		return errEnded
	case m.state == api.Paused:
		return nil
	}
	since := time.Now()
	if err := m.pause(ctx); err != nil {
		return err
	}
	c.paused.ours, c.paused.calls, c.paused.since = true, m.pauseCalls, since
	return nil
}

// letGo lets a VM run again that stand has paused, unless somebody else has
// paused it too. Preconditions: mu is held.
func (c *copying) letGo(ctx context.Context) (err error) {
	m := c.m
	if !c.paused.ours {
		return nil
	}
	c.paused.ours = false
	if m.state == api.Paused && m.pauseCalls == c.paused.calls {
		err = m.resume(context.WithoutCancel(ctx))
	}
	c.stood += time.Since(c.paused.since)
	return err
}
