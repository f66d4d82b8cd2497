package vmm

import (
	"context"
	"errors"
	"fmt"
	"runtime"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/naming"
	"ditto.vm/vmm/savehost"
)

// roomPages is room for pages that are written between the last round and the
// pause, beside twice those of the last round: 4 MiB.
const roomPages = 1024

// capture pauses the VM and captures it.
func (s *saving) capture(ctx context.Context) error {
	if err := s.ready(ctx); err != nil {
		return err
	}
	return s.standFor(ctx, func() error { return s.captureFrozen(ctx) }, func() error {
		if !s.armed {
			return nil
		}
		return s.rounds(ctx, mostRounds)
	})
}

// ready does what shall not fall into the pause: making room, and collecting
// garbage, which what was done for the save has made due.
func (s *saving) ready(ctx context.Context) error {
	if !s.armed {
		return nil
	}
	s.w.Prepare(2*s.expected + roomPages)
	runtime.GC()
	return s.rounds(ctx, 1)
}

// captureFrozen captures the VM with its disks, and lets it run again unless it is
// to end. Preconditions: mu is held and the VM is paused.
func (s *saving) captureFrozen(ctx context.Context) error {
	err := s.captureStill(ctx)
	if err == nil {
		err = s.freezeDisks()
	}
	if err != nil {
		return errors.Join(err, s.thawDisks())
	}
	if s.o.Stop {
		s.m.parting = true
		return nil
	}
	return s.letGo(ctx)
}

// captureStill captures state and memory. Reading the state comes first: nothing
// may touch memory after the last collection. Preconditions: mu is held and the
// VM is paused.
func (s *saving) captureStill(ctx context.Context) error {
	m := s.m
	var err error
	if s.sections, err = m.saveState(ctx); err != nil {
		return err
	}
	if !s.armed {
		return s.captureUntracked(ctx)
	}
	if err := m.collect(s.dirty, memory.Peek); err != nil {
		return err
	}
	s.takeLost()
	if m.naming != nil && m.naming.Changed() {
		return fmt.Errorf("%w: try again", naming.ErrChanged)
	}
	return s.w.Capture(ctx, snapshot.Capture{Dirty: s.dirty})
}

// captureUntracked does all of it in the pause, since nothing says what is
// written.
func (s *saving) captureUntracked(ctx context.Context) error {
	m := s.m
	if err := m.settle(ctx, true); err != nil {
		return err
	}
	all, err := m.namePages(ctx, true, func(done, total uint64) { s.tell(SavePause, done, total) })
	if err != nil {
		return err
	}
	return s.w.Capture(ctx, snapshot.Capture{Map: all})
}

// freezeDisks ends writing to the disks' tops: what is written from now on goes
// into the overlays. Preconditions: mu is held and the VM is paused.
func (s *saving) freezeDisks() error {
	for _, t := range s.tops {
		if err := s.freeze(t); err != nil {
			return err
		}
	}
	return nil
}

func (s *saving) freeze(t *top) error {
	d := t.disk
	if s.o.Stop {
		if err := d.image.Freeze(); err != nil {
			return err
		}
		t.frozen = true
		if d.observer != nil {
			d.observer.Frozen()
		}
		return nil
	}
	// They belong to the chain from now on, or are closed.
	fd, buffered := t.overlay.FD, t.overlay.Buffered
	t.overlay.FD, t.overlay.Buffered = -1, -1
	if err := d.image.StackFD(t.overlay.Path, fd, buffered); err != nil {
		return err
	}
	if d.observer != nil {
		if err := d.observer.Stacked(); err != nil {
			return errors.Join(err, d.image.Unstack())
		}
	}
	t.frozen = true
	s.m.pci.devices[t.n].info.Backend = t.overlay.Path
	return nil
}

// thawDisks undoes freezeDisks. A disk that cannot be thawed goes on as it is.
// Preconditions: mu is held and the VM does not run.
func (s *saving) thawDisks() error {
	var errs []error
	for _, t := range s.tops {
		if !t.frozen {
			continue
		}
		if err := s.thaw(t); err != nil {
			errs = append(errs, fmt.Errorf("disk %d cannot be as before the save and is written to %s now: %w", t.n, t.disk.image.Path(), err))
		}
	}
	return errors.Join(errs...)
}

func (s *saving) thaw(t *top) error {
	d := t.disk
	if s.o.Stop {
		if err := d.image.Thaw(); err != nil {
			return err
		}
		t.frozen = false
		if d.observer != nil {
			d.observer.Thawed()
		}
		return nil
	}
	if err := d.image.Unstack(); err != nil {
		return err
	}
	t.frozen = false
	if d.observer != nil {
		d.observer.Unstacked()
	}
	s.m.pci.devices[t.n].info.Backend = d.image.Path()
	return nil
}

// undo lets the VM go on as if there had been no save, and removes what is there
// of the snapshot. If it may be complete all the same, the disks go on in their
// overlays, so that what it needs stays as it is.
func (s *saving) undo(ctx context.Context, why error) error {
	if errors.Is(why, savehost.ErrInDoubt) && !s.o.Stop {
		return errors.New("the disks are written to their new overlays now, in case it is")
	}
	errs := []error{s.undoPause(ctx), s.abort()}
	for _, t := range s.tops {
		for _, fd := range []int{t.overlay.FD, t.overlay.Buffered} {
			if fd >= 0 {
				errs = append(errs, unix.Close(fd))
			}
		}
		t.overlay = savehost.Overlay{Path: t.overlay.Path, FD: -1, Buffered: -1}
		if !t.frozen {
			errs = append(errs, s.host.DropOverlay(t.n))
		}
	}
	return errors.Join(errs...)
}

// undoPause puts the disks back, for which the VM stands still a moment.
func (s *saving) undoPause(ctx context.Context) error {
	m := s.m
	m.mu.Lock()
	defer m.mu.Unlock()
	m.parting = false
	var errs []error
	for _, t := range s.tops {
		if t.frozen && m.state == api.Running && len(errs) == 0 {
			errs = append(errs, s.stand(ctx))
		}
	}
	if m.state != api.Running {
		errs = append(errs, s.thawDisks())
	}
	return errors.Join(append(errs, s.letGo(ctx))...)
}

// abort removes what was written of the snapshot.
func (s *saving) abort() error {
	if s.w == nil {
		return s.host.Abort()
	}
	return s.w.Abort()
}
