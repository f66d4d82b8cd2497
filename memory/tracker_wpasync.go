package memory

import (
	"errors"
	"fmt"
	"sync"
)

// wpAsync tracks writes with userfaultfd WP_ASYNC: an armed page is
// write-protected in the VMM's page tables with a bit of its own, the first
// write clears the bit, and PAGEMAP_SCAN reads and sets the bits of a range in
// one call. KVM follows the same page tables, so vCPU writes are seen too.
//
// Three rules keep it from doing harm. Only populated pages are armed: a marker
// in a hole would forbid huge pages there for good. Pages of a private mapping
// that still are the file's, or the zero page, are not written by definition,
// whatever their bit says, and are not armed. And arming goes where something
// was written, never over all of memory: PAGEMAP_SCAN tells KVM to drop its
// mappings of the whole range it is given.
//
// The VMM's own writes are seen as well, but two things are not: a discard,
// which leaves a hole, and I/O whose pages were pinned before they were armed.
// Both are reported when they are done, and kept in host.
type wpAsync struct {
	space *Space
	host  *PageSet // reported by HostWrite and not yet collected

	mu    sync.Mutex // guards what follows, and orders arming and scanning
	fault *userfault // the Space's
	pages *pagemap
	// Scratch of Collect: where to look closely, and what to arm.
	maybe, runs []hostRun
}

// hostRun is a run of host addresses, with whether huge pages map it.
type hostRun struct {
	start, end uintptr
	huge       bool
}

// joinGap is the largest gap between two runs, in bytes, that one call covers. A
// call that arms costs some microseconds and a TLB flush; covering a gap costs a
// fault of the guest for each page of it that is used later.
const joinGap = 32 * PageSize

// writtenPages asks for pages that are populated, not armed, and neither the
// zero page nor still the file's.
func writtenPages(flags uint64) scanQuery {
	return scanQuery{
		flags:    flags | scanCheckWPAsync,
		mask:     pageIsWritten | pageIsPFNZero | pageIsFile,
		inverted: pageIsPFNZero | pageIsFile,
		anyOf:    pageIsPresent | pageIsSwapped,
		ret:      pageIsHuge,
	}
}

// maybeWritten asks for pages that are not armed, holes among them. The kernel
// answers this very question by the page table entries alone; any other makes it
// look at the page behind each entry, which is some times slower.
func maybeWritten() scanQuery {
	return scanQuery{flags: scanCheckWPAsync, mask: pageIsWritten, ret: pageIsWritten}
}

// openWPAsync registers all of guest memory.
func openWPAsync(s *Space) (*wpAsync, error) {
	if s.config.Backing != Anonymous {
		return nil, &TrackerError{Kind: TrackerWPAsync, Reason: "shared memory (--memory memfd) is written by other processes and loses its marks when the host reclaims it: use kvm-log"}
	}
	t := &wpAsync{space: s, host: s.NewPageSet()}
	var err error
	if t.pages, err = openPagemap(); err != nil {
		return nil, &TrackerError{Kind: TrackerWPAsync, Reason: "cannot scan pages", Err: err}
	}
	if err := t.pages.supported(); err != nil {
		_ = t.pages.close()
		return nil, &TrackerError{Kind: TrackerWPAsync, Reason: "the kernel lacks PAGEMAP_SCAN: Linux 6.7 or newer is needed", Err: err}
	}
	if t.fault, err = s.openFault(); err != nil {
		_ = t.pages.close()
		return nil, &TrackerError{Kind: TrackerWPAsync, Reason: "no userfaultfd with WP_ASYNC: Linux 6.7 or newer is needed, and a sandbox that allows userfaultfd", Err: err}
	}
	if err := s.trackWrites(); err != nil {
		_ = t.Close()
		return nil, &TrackerError{Kind: TrackerWPAsync, Reason: "cannot register RAM", Err: err}
	}
	// No bit tells of a file's page that it was never armed.
	if files := s.remaps.files.Load(); files != nil {
		t.host.union(files)
	}
	return t, nil
}

func (t *wpAsync) Kind() TrackerKind           { return TrackerWPAsync }
func (t *wpAsync) HostWrite(gpa GPA, n uint64) { t.host.Add(gpa, n) }

// Arm arms the populated pages of r. A frame that the host maps large must be
// covered whole.
func (t *wpAsync) Arm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.locateFrames(r)
	if err != nil {
		return fmt.Errorf("arm: %w", err)
	}
	t.host.Remove(r.Start, r.Size)
	if m := t.space.missing.Load(); m != nil {
		m.collect(r, nil, true)
	}
	t.space.remaps.mu.RLock()
	defer t.space.remaps.mu.RUnlock()
	err = t.pages.scan(p.hva(r.Start), p.hva(r.End()), writtenPages(scanWPMatching), func(uintptr, uintptr, uint64) {})
	if err != nil {
		return fmt.Errorf("arm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// Collect first looks without arming, which costs the guest nothing, and then
// gets and arms, atomically for each page, where something was written.
func (t *wpAsync) Collect(r Range, into *PageSet, mode CollectMode) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err != nil {
		return fmt.Errorf("collect: %w", err)
	}
	if mode == Peek {
		t.host.copyTo(into, r.Start, r.Size)
	} else {
		t.host.moveTo(into, r.Start, r.Size)
	}
	// Before the scan: what comes meanwhile comes armed.
	if m := t.space.missing.Load(); m != nil {
		m.collect(r, into, mode != Peek)
	}
	t.space.remaps.mu.RLock()
	defer t.space.remaps.mu.RUnlock()
	if err := t.collect(p, into, mode); err != nil {
		return fmt.Errorf("collect [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

func (t *wpAsync) collect(p part, into *PageSet, mode CollectMode) error {
	t.maybe, t.runs = t.maybe[:0], t.runs[:0]
	err := t.pages.scan(p.hva(p.Start), p.hva(p.End()), maybeWritten(), func(start, end uintptr, _ uint64) {
		t.maybe = appendRun(t.maybe, hostRun{start: start, end: end})
	})
	if err != nil {
		into.Add(p.Start, p.Size)
		return err
	}
	for _, m := range t.maybe {
		err := t.pages.scan(m.start, m.end, writtenPages(0), func(start, end uintptr, categories uint64) {
			into.Add(p.gpa(start), uint64(end-start))
			if mode != Peek {
				t.rearm(hostRun{start, end, categories&pageIsHuge != 0 && t.breakable()}, mode)
			}
		})
		if err != nil {
			into.Add(p.Start, p.Size)
			return err
		}
	}
	for _, run := range t.runs {
		err := t.pages.scan(run.start, run.end, writtenPages(scanWPMatching), func(start, end uintptr, _ uint64) {
			into.Add(p.gpa(start), uint64(end-start))
		})
		if err != nil {
			// Pages may have been armed without being reported.
			into.Add(p.Start, p.Size)
			return err
		}
	}
	return nil
}

// breakable reports whether arming can break large frames. Pages of hugetlbfs
// never break: they are armed and reported whole.
func (t *wpAsync) breakable() bool {
	return t.space.config.HugePages == HugePagesTHP || t.space.config.HugePages == HugePagesOff
}

// rearm notes a written run for arming. Only whole huge pages may be armed: a
// huge run that the range's border cuts stays as it is.
func (t *wpAsync) rearm(run hostRun, mode CollectMode) {
	if run.huge {
		if mode == RearmSmall {
			return
		}
		run.start = (run.start + LargeFrameSize - 1) &^ (LargeFrameSize - 1)
		run.end &^= LargeFrameSize - 1
		if run.start >= run.end {
			return
		}
	}
	t.runs = appendRun(t.runs, run)
}

// appendRun adds a run behind the others, joined with the last when they are
// close and mapped alike.
func appendRun(runs []hostRun, run hostRun) []hostRun {
	if n := len(runs); n > 0 && runs[n-1].huge == run.huge && run.start-runs[n-1].end <= joinGap {
		runs[n-1].end = run.end
		return runs
	}
	return append(runs, run)
}

// Disarm lets all pages of r count as written.
func (t *wpAsync) Disarm(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.locateFrames(r)
	if err == nil {
		if m := t.space.missing.Load(); m != nil {
			m.disarm(r)
		}
		t.space.remaps.mu.RLock()
		defer t.space.remaps.mu.RUnlock()
		err = t.fault.unprotect(p.hva(r.Start), uintptr(r.Size))
	}
	if err != nil {
		return fmt.Errorf("disarm [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// Remapped registers the new mapping. What it holds may differ from what was
// there, and where it is the file's pages no bit will say so: all of it is
// reported once.
func (t *wpAsync) Remapped(r Range) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	p, err := t.space.locate(r)
	if err == nil {
		t.host.Add(r.Start, r.Size)
		err = t.fault.register(p.hva(r.Start), uintptr(r.Size), uffdRegisterModeWP)
	}
	if err != nil {
		return fmt.Errorf("register [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// Close disarms everything, unless pages are still missing.
func (t *wpAsync) Close() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return errors.Join(t.space.closeFault(), t.pages.close())
}

// locateFrames checks r as [Space.locate] does, and that it does not cut a
// frame that the host maps large.
func (t *wpAsync) locateFrames(r Range) (part, error) {
	p, err := t.space.locate(r)
	if err != nil {
		return part{}, err
	}
	if !t.breakable() {
		return p, nil
	}
	for _, edge := range []GPA{r.Start, r.End()} {
		frame := edge &^ (LargeFrameSize - 1)
		if edge == frame || r.Size == 0 || !p.region.Contains(frame, LargeFrameSize) {
			continue
		}
		huge, err := t.pages.isHuge(p.hva(frame))
		if err != nil {
			return part{}, err
		}
		if huge {
			return part{}, fmt.Errorf("[%s, +%#x) cuts the frame at %s: %w", r.Start, r.Size, frame, ErrPartOfLargeFrame)
		}
	}
	return p, nil
}
