package memory

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// place makes those pages of run that still wait pages with the bytes of buf.
func (m *Missing) place(run Range, buf []byte) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.waiting.spans(run, func(waits Range, in bool) error {
		if !in {
			return nil
		}
		return m.armed.spans(waits, func(part Range, armed bool) error {
			return m.put(part, buf[part.Start-run.Start:][:part.Size], armed)
		})
	})
}

// put makes pages of bytes, armed or not.
//
// Preconditions: mu is held, and the pages wait.
func (m *Missing) put(pages Range, buf []byte, armed bool) error {
	hva := m.hva(pages.Start)
	return m.arrive(pages, func(done uint64) (uint64, error) {
		n, err := m.fault.copy(hva+uintptr(done), buf[done:], armed)
		m.copied.Add(uint64(n) / PageSize)
		return uint64(n), err
	})
}

// zero makes those pages of run that are holes and do not wait the page of zeros.
func (m *Missing) zero(run Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.holes.spans(run, func(holes Range, in bool) error {
		if !in {
			return nil
		}
		return m.waiting.spans(holes, func(part Range, waits bool) error {
			if waits {
				return nil
			}
			hva := m.hva(part.Start)
			return m.arrive(part, func(done uint64) (uint64, error) {
				n, err := m.fault.zero(hva+uintptr(done), uintptr(part.Size-done))
				return uint64(n), err
			})
		})
	})
}

// arrive calls fill until all of pages are there, and notes them. fill is told
// how much is done and returns how much it has done.
//
// Preconditions: mu is held.
func (m *Missing) arrive(pages Range, fill func(done uint64) (uint64, error)) error {
	for done := uint64(0); done < pages.Size; {
		n, err := fill(done)
		if errors.Is(err, unix.EEXIST) {
			// Somebody wrote it before it was registered. Who waits may see it.
			err = m.fault.wake(m.hva(pages.Start)+uintptr(done+n), PageSize)
			n += PageSize
		}
		m.arrived(Range{Start: pages.Start + GPA(done), Size: n})
		if done += n; err != nil {
			return fmt.Errorf("fill page %s: %w", (pages.Start + GPA(done)).GFN(), err)
		}
	}
	return nil
}

// arrived notes that pages are there.
//
// Preconditions: mu is held.
func (m *Missing) arrived(r Range) {
	m.left.Add(-int64(m.waiting.CountIn(r.Start, r.Size)))
	m.open.Add(-int64(m.holes.CountIn(r.Start, r.Size)))
	for _, set := range []*PageSet{m.waiting, m.holes, m.armed} {
		set.Remove(r.Start, r.Size)
	}
}

// complete fills the holes of frames that r touches and in which nothing waits
// any more.
func (m *Missing) complete(r Range) error {
	for gpa := r.Start &^ (LargeFrameSize - 1); gpa < r.End(); gpa += LargeFrameSize {
		frame := m.frame(gpa)
		if m.waiting.CountIn(frame.Start, frame.Size) > 0 {
			continue
		}
		if err := m.zero(frame); err != nil {
			return err
		}
		m.space.settle(frame)
	}
	return nil
}

// frame returns the frame at gpa, as far as it is RAM.
func (m *Missing) frame(gpa GPA) Range {
	frame, _ := intersect(m.space.find(gpa, 1).Range, Range{Start: gpa, Size: LargeFrameSize})
	return frame
}

// forget says that pages are about to be given back: they are zeros from now on,
// and a frame that they are of has nothing missing any more and is not registered
// for it. Its other pages are fetched.
func (m *Missing) forget(r Range) error {
	if m.registered.CountIn(r.Start, r.Size) == 0 {
		return nil
	}
	m.mu.Lock()
	m.left.Add(-int64(m.waiting.CountIn(r.Start, r.Size)))
	m.waiting.Remove(r.Start, r.Size)
	m.mu.Unlock()
	for gpa := r.Start &^ (LargeFrameSize - 1); gpa < r.End(); gpa += LargeFrameSize {
		frame := m.frame(gpa)
		if m.registered.CountIn(frame.Start, frame.Size) == 0 {
			continue
		}
		for at := m.waiting.next(frame.Start, frame.End(), true); at < frame.End(); at = m.waiting.next(at, frame.End(), true) {
			run := m.run(at, frame.End())
			if err := m.fill(run); err != nil {
				return m.fail(run, err)
			}
			at = run.End()
		}
		if err := m.release(frame); err != nil {
			return err
		}
		m.space.settle(frame)
	}
	return nil
}

// release unregisters a frame in which nothing waits: its holes are the kernel's
// again. It is disarmed by that: to a tracker all of it was written.
func (m *Missing) release(frame Range) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.space.remaps.mu.Lock()
	defer m.space.remaps.mu.Unlock()
	err := m.registered.spans(frame, func(run Range, in bool) error {
		if !in {
			return nil
		}
		if err := m.fault.unregister(m.hva(run.Start), uintptr(run.Size)); err != nil {
			return err
		}
		p, err := m.space.locate(run)
		if err != nil {
			return err
		}
		return m.space.registerWrites(p)
	})
	m.arrived(frame)
	m.registered.Remove(frame.Start, frame.Size)
	return err
}

// abandon says that memory is made anew, which remap does: nothing is missing any
// more.
func (m *Missing) abandon(remap func() error) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	err := remap()
	for i := range m.space.regions {
		r := m.space.regions[i].Range
		m.arrived(r)
		m.registered.Remove(r.Start, r.Size)
		m.failed.Remove(r.Start, r.Size)
		err = errors.Join(err, m.fault.wake(m.hva(r.Start), uintptr(r.Size)))
	}
	return err
}

// fail makes those pages of r inaccessible that are still holes, since they cannot
// be had: whoever touches them gets an error, never other bytes. It returns err.
func (m *Missing) fail(r Range, err error) error {
	if m.broken.CompareAndSwap(nil, &err) && m.options.Failed != nil {
		m.options.Failed(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.holes.spans(r, func(run Range, in bool) error {
		if !in {
			return nil
		}
		m.failed.Add(run.Start, run.Size)
		region := m.space.find(run.Start, run.Size)
		// A vCPU and I/O get EFAULT.
		protect := unix.Mprotect(region.part(run), unix.PROT_NONE)
		if protect == nil {
			m.arrived(run)
		}
		return errors.Join(protect, m.fault.wake(m.hva(run.Start), uintptr(run.Size)))
	})
	return err
}

// collect adds to a set what waits of r and was never armed, and arms it if it is
// to be: such a page has come to nobody's notice yet.
func (m *Missing) collect(r Range, into *PageSet, arm bool) {
	if m.open.Load() == 0 {
		return
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	_ = m.waiting.spans(r, func(waits Range, in bool) error {
		if !in {
			return nil
		}
		return m.armed.spans(waits, func(part Range, armed bool) error {
			if !armed && into != nil {
				into.Add(part.Start, part.Size)
			}
			if !armed && arm {
				m.armed.Add(part.Start, part.Size)
			}
			return nil
		})
	})
}

// disarm says that what waits of r is to count as written.
func (m *Missing) disarm(r Range) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.armed.Remove(r.Start, r.Size)
}
