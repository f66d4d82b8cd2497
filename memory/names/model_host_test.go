package names

import (
	"io"

	"ditto.vm/memory"
)

// modelTracker sees the stores of vCPUs by itself, and of the VMM what it is
// told: like KVM's log, and like wp-async with pinned pages.
type modelTracker struct{ m *model }

func (k modelTracker) Kind() memory.TrackerKind { return memory.TrackerWPAsync }
func (k modelTracker) Close() error             { return nil }

func (k modelTracker) each(r memory.Range, f func(memory.GFN)) {
	for gpa := r.Start; gpa < r.End(); gpa += memory.PageSize {
		f(gpa.GFN())
	}
}

func (k modelTracker) HostWrite(gpa memory.GPA, n uint64) {
	k.each(memory.Range{Start: gpa &^ 4095, Size: (n + uint64(gpa)%4096 + 4095) &^ 4095}, func(g memory.GFN) { k.m.armed[g] = false })
}

func (k modelTracker) Arm(r memory.Range) error {
	if r.Size < memory.LargeFrameSize && k.m.large[r.Start/memory.LargeFrameSize] {
		return memory.ErrPartOfLargeFrame
	}
	k.m.whileLocked(func() { k.each(r, func(g memory.GFN) { k.m.armed[g] = true }) })
	return nil
}

func (k modelTracker) Disarm(r memory.Range) error {
	k.m.whileLocked(func() { k.each(r, func(g memory.GFN) { k.m.armed[g] = false }) })
	return nil
}

func (k modelTracker) Remapped(r memory.Range) error { return k.Disarm(r) }

func (k modelTracker) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	k.m.whileLocked(func() {
		k.each(r, func(g memory.GFN) {
			if k.m.armed[g] {
				return
			}
			into.Add(g.GPA(), 1)
			if mode == memory.Rearm {
				k.m.armed[g] = true
			}
		})
	})
	return nil
}

// whileLocked runs f in one moment, with other things before and after, but no
// other use of the tracker.
func (m *model) whileLocked(f func()) {
	was := m.locked
	m.locked = true
	m.yield()
	f()
	m.yield()
	m.locked = was
}

// modelFramesBook is the host's view of frames: a store into an armed large one
// breaks it.
type modelFramesBook struct{ m *model }

func (f modelFramesBook) Refresh(memory.Range) error { return nil }

func (f modelFramesBook) At(gpa memory.GPA) (memory.FrameState, memory.FrameReasons, bool) {
	if f.m.large[gpa/memory.LargeFrameSize] {
		return memory.FrameLarge, 0, true
	}
	return memory.FrameSmall, memory.ReasonTracking, true
}

func (f modelFramesBook) Collapse(gpa memory.GPA, _ int) error {
	m := f.m
	m.yield()
	switch m.rng.IntN(6) {
	case 0:
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrFrameBusy}
	case 1:
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrFrameHeld}
	}
	modelTracker{m}.each(memory.Range{Start: gpa, Size: memory.LargeFrameSize}, func(g memory.GFN) { m.armed[g] = false })
	if m.rng.IntN(6) == 0 {
		return &memory.FrameError{Op: "collapse", GPA: gpa, Err: memory.ErrNoHugePage}
	}
	m.large[gpa/memory.LargeFrameSize] = true
	m.yield()
	return nil
}

// modelSource reads the disk as the prover does.
type modelSource struct{ m *model }

func (s modelSource) ReadAt(p []byte, off int64) (int, error) {
	s.m.yield()
	n := 0
	if off < int64(len(s.m.disk)) {
		n = copy(p, s.m.disk[off:])
	}
	s.m.yield()
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}
