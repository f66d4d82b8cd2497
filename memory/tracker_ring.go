package memory

import "fmt"

// RingLog is what a VM with dirty rings offers; the VM of package vmm/kvm
// satisfies it.
type RingLog interface {
	SlotLogger
	// ResetDirtyRings protects again what was harvested and returns how many
	// entries that were (KVM API 8.29).
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
	slotTracker
	log RingLog

	rings []DirtyRing // emptied one at a time, under mu
	// Guarded by mu: entries that are not reset yet, and whether a reset ended
	// before it was done, so that pages may have been left unprotected.
	harvested int
	cut       bool
}

// openKVMRing makes a tracker of the vCPUs' rings.
func openKVMRing(s *Space, log RingLog, rings []DirtyRing) *KVMRing {
	return &KVMRing{slotTracker: newSlotTracker(s, log), log: log, rings: rings}
}

// Kind implements [Tracker].
func (t *KVMRing) Kind() TrackerKind { return TrackerKVMRing }

// RingFull empties the rings, so that a vCPU that left the guest for want of
// room can go on. It is called on that vCPU's thread.
func (t *KVMRing) RingFull() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.drain()
}

// resetTries bounds how often a reset that ends early is tried again.
const resetTries = 1000

// drain moves what the rings hold to pending and arms it again.
//
// Since Linux 6.16 a reset ends early when a signal is pending. It returns what
// it has taken out of the rings by then, and of that it does not protect the
// last pages, up to 64 (kvm_dirty_ring_reset): nobody knows which. So the rest is
// reset, without which a vCPU whose ring is full could not go on, and then
// everything is protected anew.
func (t *KVMRing) drain() error {
	for _, ring := range t.rings {
		t.harvested += ring.Harvest(func(slot uint32, page uint64) {
			for i := range t.space.regions {
				r := &t.space.regions[i]
				if r.Slot == slot && page < r.Size>>PageShift {
					t.pending.addPage(i, page)
				}
			}
		})
	}
	for try := 0; t.harvested > 0; try++ {
		n, err := t.log.ResetDirtyRings()
		if err != nil {
			return fmt.Errorf("dirty ring: %w", err)
		}
		t.harvested -= n
		t.cut = t.cut || t.harvested > 0
		if try == resetTries {
			return fmt.Errorf("dirty ring: %d entries are not reset", t.harvested)
		}
	}
	if !t.cut {
		return nil
	}
	if err := t.protectAll(); err != nil {
		return fmt.Errorf("dirty ring: protect all pages: %w", err)
	}
	t.cut = false
	return nil
}

// protectAll switches the logging of every region that is logged off and on,
// which protects all of it. What was written meanwhile is not known.
func (t *KVMRing) protectAll() error {
	for i := range t.space.regions {
		if !t.logging[i] {
			continue
		}
		r := &t.space.regions[i]
		p := part{region: r, index: i, Range: r.Range}
		t.pending.Add(r.Start, r.Size)
		if err := t.setLogging(p, false); err != nil {
			return err
		}
		if err := t.setLogging(p, true); err != nil {
			return err
		}
	}
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
	if err := t.setLogging(p, true); err != nil {
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
	t.take(p, into, mode)
	return nil
}
