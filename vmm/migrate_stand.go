package vmm

import (
	"context"
	"errors"
	"fmt"

	"ditto.vm/migration/state"
	"ditto.vm/vmm/api"
)

// Pause implements [live.SourceVM].
func (d *departure) Pause(ctx context.Context) error {
	if err := d.ended(); err != nil {
		return err
	}
	return d.standFor(ctx, func() error {
		if d.offered.Paused == d.paused.ours || d.m.pauseCalls != d.calls {
			return fmt.Errorf("somebody has paused or resumed the VM since it was offered: try again: %w", api.ErrWrongState)
		}
		d.m.standing = &standing{decided: make(chan struct{}), committed: make(chan struct{})}
		return nil
	}, d.ended)
}

// Resume implements [live.SourceVM]. A VM that was paused before stays so.
func (d *departure) Resume(ctx context.Context) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.away {
		return fmt.Errorf("resume: %w", errAway)
	}
	if m.standing == nil {
		return nil
	}
	m.standing.decide()
	m.standing = nil
	return d.letGo(ctx)
}

// decide wakes who waits for the outcome.
func (s *standing) decide() {
	if !s.closed {
		s.closed = true
		close(s.decided)
	}
}

// State implements [live.SourceVM].
func (d *departure) State(ctx context.Context) ([]state.Section, error) {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := d.standsStill(); err != nil {
		return nil, err
	}
	sections, err := m.saveState(ctx)
	if err != nil {
		return nil, fmt.Errorf("migrate: %w", err)
	}
	return sections, nil
}

// standsStill returns an error unless the VM stands still for this migration.
// Preconditions: mu is held.
func (d *departure) standsStill() error {
	m := d.m
	switch {
	case m.endReason != nil || m.state == api.Stopped || m.closed:
		return errEnded
	case m.standing == nil || m.state != api.Paused:
		return fmt.Errorf("migrate: VM is %s, not paused for it: %w", m.state, api.ErrWrongState)
	}
	return nil
}

// ReleaseDisks implements [live.SourceVM].
func (d *departure) ReleaseDisks(context.Context) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if err := d.standsStill(); err != nil {
		return err
	}
	// Whatever fails, parts may be another's by now.
	m.away = true
	for i := range m.disks {
		if err := m.disks[i].image.Release(); err != nil {
			return err
		}
	}
	return nil
}

// ReclaimDisks implements [live.SourceVM]. It may be called again when it has
// failed.
func (d *departure) ReclaimDisks(context.Context) error {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.away {
		return nil
	}
	if m.endReason != nil || m.state == api.Stopped || m.closed {
		return errEnded
	}
	for i := range m.disks {
		if err := m.disks[i].image.Reclaim(); err != nil {
			for j := range i {
				err = errors.Join(err, m.disks[j].image.Release())
			}
			return err
		}
	}
	m.away = false
	return nil
}

// End implements [live.SourceVM].
func (d *departure) End() error {
	if d.done == nil {
		return nil
	}
	m := d.m
	m.throttle.set(m.vcpus, 0)
	m.mu.Lock()
	m.leaving = false
	if m.standing != nil {
		m.standing.decide() // as far as it is here
	}
	m.mu.Unlock()
	d.done()
	d.done = nil
	return d.disks.forgetWitnesses()
}

// Committed implements [live.SourceVM].
func (d *departure) Committed() <-chan struct{} {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if s := m.standing; s != nil {
		close(s.committed)
	}
	return m.ended
}

// Left implements [live.SourceVM].
func (d *departure) Left(where string) {
	d.m.log.Info("the guest runs somewhere else now", "where", where)
	d.m.end(Exit{Reason: ExitMigrated})
}

// mayRun returns why a VM that is paused must not run. Preconditions: mu is held.
func (m *VM) mayRun() error {
	switch {
	case m.parting:
		return fmt.Errorf("VM is saved and about to end: %w", api.ErrWrongState)
	case m.away:
		return errAway
	case m.standing != nil:
		return fmt.Errorf("it stands still for a migration: %w", api.ErrWrongState)
	}
	return nil
}

// decided waits until it is decided where a VM runs that stands still for a
// migration: a guest that is ended in that moment would go on elsewhere. One that
// does, and whose memory is not all there yet, is waited for, too.
func (m *VM) decided(ctx context.Context) error {
	m.mu.Lock()
	s := m.standing
	m.mu.Unlock()
	if s == nil {
		return nil
	}
	select {
	case <-s.decided:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// decidedOrGone is decided, but does not wait for memory: who ends the VM here by
// force gives up the guest that needs it.
func (m *VM) decidedOrGone() {
	m.mu.Lock()
	s := m.standing
	m.mu.Unlock()
	if s == nil {
		return
	}
	select {
	case <-s.decided:
	case <-s.committed:
		m.log.Warn("ended before the guest had all of its memory where it runs now: it will stand still there when it needs the rest")
	}
}
