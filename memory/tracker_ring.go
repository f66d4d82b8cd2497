package memory

import (
	"fmt"
	"sync"
)

// RingLog is what a VM with dirty rings offers; the VM of package vmm/kvm
// satisfies it.
type RingLog interface {
	SlotLogger
	// ResetDirtyRings protects again what was harvested (KVM API 8.29).
	ResetDirtyRings() (int, error)
}

// DirtyRing is the dirty ring of one vCPU.
type DirtyRing interface {
	// Harvest calls visit for each page that the vCPU wrote, a slot and a page
	// number in it, hands the entries back to the kernel and returns how many
	// they were.
	Harvest(visit func(slot uint32, page uint64)) int
}

// KVMRing tracks vCPU writes with KVM's dirty rings: each vCPU appends the
// pages it writes to a ring, so that what a round costs follows what was
// written and not the size of memory. The rings must be enabled before the first
// vCPU is made, and then there is no bitmap.
//
// Switching logging on protects the whole memslot. A vCPU whose ring is full
// exits, and goes on when [KVMRing.RingFull] has emptied it. Hardware may keep
// the last writes of a running vCPU to itself: they are reported after the vCPU
// has left the guest.
type KVMRing struct {
	space *Space
	log   RingLog

	pending *PageSet // harvested or written by the VMM, not yet collected

	mu        sync.Mutex // guards what follows; harvests are one at a time
	rings     []DirtyRing
	logging   []bool // per region
	harvested bool   // entries that are not reset yet
}

// OpenKVMRing makes a tracker of the vCPUs' rings. The caller hands it to
// [Space.SetObserver], as it does with what [OpenTracker] returns.
func OpenKVMRing(s *Space, log RingLog, rings []DirtyRing) *KVMRing {
	return &KVMRing{space: s, log: log, rings: rings, pending: s.NewPageSet(), logging: make([]bool, len(s.regions))}
}

// Kind returns TrackerKVMRing.
func (t *KVMRing) Kind() TrackerKind { return TrackerKVMRing }

// HostWrite implements [WriteObserver].
func (t *KVMRing) HostWrite(gpa GPA, n uint64) { t.pending.Add(gpa, n) }

// RingFull empties the rings, so that a vCPU that left the guest for want of
// room can go on. It is called on that vCPU's thread.
func (t *KVMRing) RingFull() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.drain()
}

// drain moves what the rings hold to pending and arms it again.
func (t *KVMRing) drain() error {
	for _, ring := range t.rings {
		n := ring.Harvest(func(slot uint32, page uint64) {
			for i := range t.space.regions {
				r := &t.space.regions[i]
				if r.Slot == slot && page < r.Size>>PageShift {
					t.pending.addPage(i, page)
				}
			}
		})
		t.harvested = t.harvested || n > 0
	}
	if !t.harvested {
		return nil
	}
	if _, err := t.log.ResetDirtyRings(); err != nil {
		return fmt.Errorf("dirty ring: %w", err)
	}
	t.harvested = false
	return nil
}

// Arm implements [Tracker]. The first call protects the whole region of r.
func (t *KVMRing) Arm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err == nil {
		err = t.arm(p)
	}
	if err != nil {
		return fmt.Errorf("arm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

func (t *KVMRing) arm(p part) error {
	if !t.logging[p.index] {
		// What lies around r was never armed: it counts as written.
		t.pending.Add(p.region.Start, p.region.Size)
	}
	if err := setLogging(t.log, t.logging, p, true); err != nil {
		return err
	}
	if err := t.drain(); err != nil {
		return err
	}
	t.pending.Remove(p.Start, p.Size)
	return nil
}

// Collect implements [Tracker].
func (t *KVMRing) Collect(r Range, into *PageSet, mode CollectMode) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err == nil {
		err = t.collect(p, into, mode)
	}
	if err != nil {
		into.Add(r.Start, r.Size)
		return fmt.Errorf("collect [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

func (t *KVMRing) collect(p part, into *PageSet, mode CollectMode) error {
	if !t.logging[p.index] {
		into.Add(p.Start, p.Size)
		if mode == Peek {
			return nil
		}
		return t.arm(p)
	}
	if err := t.drain(); err != nil {
		return err
	}
	if mode == Peek {
		t.pending.copyTo(into, p.Start, p.Size)
	} else {
		t.pending.moveTo(into, p.Start, p.Size)
	}
	return nil
}

// Disarm implements [Tracker]: it switches logging off when r is a whole
// region, and otherwise notes that r counts as written.
func (t *KVMRing) Disarm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	switch {
	case err != nil:
	case p.whole():
		err = setLogging(t.log, t.logging, p, false)
	default:
		t.pending.Add(r.Start, r.Size)
	}
	if err != nil {
		return fmt.Errorf("disarm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// Remapped implements [Tracker]. KVM follows the new mapping by itself.
func (t *KVMRing) Remapped(r Range) error {
	if _, err := t.space.locate(r); err != nil {
		return err
	}
	t.pending.Add(r.Start, r.Size)
	return nil
}

// Close switches logging off. The rings belong to whoever made them.
func (t *KVMRing) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return stopLogging(t.space, t.log, t.logging)
}
