package memory

import "fmt"

// DirtyLog is KVM's dirty bitmap as this package needs it; the VM of package
// vmm/kvm satisfies it. A bitmap has one bit a page from the start of the slot.
type DirtyLog interface {
	// EnableManualDirtyLog turns on KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with
	// manual protection and initially-set (KVM API 7.18).
	EnableManualDirtyLog() error
	SlotLogger
	// DirtyLog reads a slot's bitmap without changing it (KVM API 4.8).
	DirtyLog(slot uint32, bitmap []uint64) error
	// ClearDirtyLog clears and write-protects the pages whose bit is set, of
	// nPages from firstPage, a multiple of 64 (KVM API 4.117).
	ClearDirtyLog(slot uint32, firstPage uint64, nPages uint32, bitmap []uint64) error
}

// kvmLog tracks vCPU writes with KVM's dirty bitmap. Manual protection makes
// reading and re-arming two calls, so that only what was reported is protected
// again, and initially-set makes switching on cheap: every page counts as
// written and frames stay large until they are armed.
//
// While a slot is logged KVM maps what the guest newly writes there with 4 KiB
// entries, whether armed or not, though the host's pages stay huge.
type kvmLog struct {
	slotTracker
	log     DirtyLog
	scratch []uint64 // one region's bitmap, guarded by mu
}

func openKVMLog(s *Space, log DirtyLog) (*kvmLog, error) {
	if log == nil {
		return nil, &TrackerError{Kind: TrackerKVMLog, Reason: "there is no KVM"}
	}
	if err := log.EnableManualDirtyLog(); err != nil {
		return nil, &TrackerError{Kind: TrackerKVMLog, Reason: "KVM lacks KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 with initially-set (Linux 5.7), or a dirty ring is in use", Err: err}
	}
	t := &kvmLog{slotTracker: newSlotTracker(s, log), log: log}
	words := 0
	for i := range t.pending.regions {
		words = max(words, len(t.pending.regions[i].words))
	}
	t.scratch = make([]uint64, words)
	return t, nil
}

// Kind implements [Tracker].
func (t *kvmLog) Kind() TrackerKind { return TrackerKVMLog }

// Arm switches logging on for the region of r where it is off, and protects r.
func (t *kvmLog) Arm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err == nil {
		t.pending.Remove(r.Start, r.Size)
		err = t.arm(p)
	}
	if err != nil {
		return fmt.Errorf("arm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

func (t *kvmLog) arm(p part) error {
	if p.Size == 0 {
		return nil
	}
	if err := t.setLogging(p, true); err != nil {
		return err
	}
	all := t.scratch[:len(t.pending.regions[p.index].words)]
	for i := range all {
		all[i] = ^uint64(0)
	}
	return t.clear(p, all)
}

// clear protects the pages of p whose bit is set in bitmap, which is the whole
// region's and is changed.
func (t *kvmLog) clear(p part, bitmap []uint64) error {
	first, last := t.window(p, bitmap)
	pages := min(uint64(last)*64, p.region.Size>>PageShift) - uint64(first)*64
	// The kernel takes the number of pages as 32 bits, in multiples of 64.
	const most = 1 << 31
	for pages > 0 {
		n := min(pages, most)
		if err := t.log.ClearDirtyLog(p.region.Slot, uint64(first)*64, uint32(n), bitmap[first:]); err != nil {
			return err
		}
		first, pages = first+int(n/64), pages-n
	}
	return nil
}

// window returns the words of the region's bitmap that hold p's pages and
// clears the bits in them that are not p's.
func (t *kvmLog) window(p part, bitmap []uint64) (first, last int) {
	firstPage := uint64(p.Start-p.region.Start) >> PageShift
	endPage := uint64(p.End()-p.region.Start) >> PageShift
	first, last = int(firstPage/64), int((endPage+63)/64)
	bitmap[first] &= ^uint64(0) << (firstPage % 64)
	if endPage%64 != 0 {
		bitmap[last-1] &= ^uint64(0) >> (64 - endPage%64)
	}
	return first, last
}

// Collect reads the whole region's bitmap, which is how KVM gives it, and
// protects again what it reports.
func (t *kvmLog) Collect(r Range, into *PageSet, mode CollectMode) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err == nil && p.Size > 0 {
		err = t.collect(p, into, mode)
	}
	if err != nil {
		return fmt.Errorf("collect [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

func (t *kvmLog) collect(p part, into *PageSet, mode CollectMode) error {
	t.take(p, into, mode)
	if !t.logging[p.index] {
		into.Add(p.Start, p.Size)
		if mode == Peek {
			return nil
		}
		return t.arm(p)
	}
	bitmap := t.scratch[:len(t.pending.regions[p.index].words)]
	if err := t.log.DirtyLog(p.region.Slot, bitmap); err != nil {
		into.Add(p.Start, p.Size)
		return err
	}
	first, last := t.window(p, bitmap)
	dirty := false
	for i := first; i < last; i++ {
		if w := bitmap[i]; w != 0 {
			dirty = true
			into.addWord(p.index, i, w)
		}
	}
	if !dirty || mode == Peek {
		return nil
	}
	return t.clear(p, bitmap)
}
