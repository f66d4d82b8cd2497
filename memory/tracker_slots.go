package memory

import (
	"errors"
	"fmt"
	"sync"
)

// SlotLogger switches the logging of a memslot on or off (KVM API 4.35).
type SlotLogger interface {
	LogDirtyPages(slot uint32, gpa, size, hva uint64, on bool) error
}

// slotTracker is what the trackers over KVM's logs have in common: KVM logs
// whole memslots, one a region, and does not see what the VMM writes.
type slotTracker struct {
	space *Space
	slots SlotLogger
	// pending counts as written and is not collected yet: the VMM's own
	// writes, what was disarmed or remapped, and what rings were emptied of.
	pending *PageSet

	mu      sync.Mutex // guards logging, and orders the calls to KVM
	logging []bool     // per region
}

func newSlotTracker(s *Space, slots SlotLogger) slotTracker {
	return slotTracker{space: s, slots: slots, pending: s.NewPageSet(), logging: make([]bool, len(s.regions))}
}

// HostWrite implements [WriteObserver].
func (t *slotTracker) HostWrite(gpa GPA, n uint64) { t.pending.Add(gpa, n) }

// Disarm implements [Tracker]: it switches logging off when r is a whole region,
// and otherwise notes that r counts as written.
func (t *slotTracker) Disarm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	switch {
	case err != nil:
	case p.whole():
		err = t.setLogging(p, false)
	default:
		t.pending.Add(r.Start, r.Size)
	}
	if err != nil {
		return fmt.Errorf("disarm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// Remapped implements [Tracker]. KVM follows the new mapping by itself.
func (t *slotTracker) Remapped(r Range) error {
	if _, err := t.space.locate(r); err != nil {
		return fmt.Errorf("remapped: %w", err)
	}
	t.pending.Add(r.Start, r.Size)
	return nil
}

// Close implements [Tracker]: it switches logging off.
func (t *slotTracker) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	var errs []error
	for i := range t.space.regions {
		r := &t.space.regions[i]
		if err := t.setLogging(part{region: r, index: i, Range: r.Range}, false); err != nil {
			errs = append(errs, fmt.Errorf("stop logging the slot at %s: %w", r.Start, err))
		}
	}
	return errors.Join(errs...)
}

// setLogging switches the logging of p's region on or off where it is not.
//
// Preconditions: mu is held.
func (t *slotTracker) setLogging(p part, on bool) error {
	if t.logging[p.index] == on {
		return nil
	}
	r := p.region
	if err := t.slots.LogDirtyPages(r.Slot, uint64(r.Start), r.Size, uint64(r.HVA), on); err != nil {
		return err
	}
	t.logging[p.index] = on
	return nil
}

// take moves or copies what is pending in p to into, as mode says.
func (t *slotTracker) take(p part, into *PageSet, mode CollectMode) {
	if mode == Peek {
		t.pending.copyTo(into, p.Start, p.Size)
	} else {
		t.pending.moveTo(into, p.Start, p.Size)
	}
}
