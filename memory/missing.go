package memory

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// PageSource has the bytes of pages that memory lacks. Its methods are called
// from any goroutine and never touch guest memory.
type PageSource interface {
	// ReadPages fills dst, whole pages, with what the pages from gfn on hold.
	ReadPages(gfn GFN, dst []byte) error
	// Row returns the pages around gfn that are read together with it at little
	// more cost.
	Row(gfn GFN) Range
}

// MissingOptions say how missing pages are fetched.
type MissingOptions struct {
	// TrackWrites says that the tracker will be wp-async: memory is registered
	// for both purposes at once.
	TrackWrites bool
	// Failed hears of the first page that somebody waits for and that cannot be
	// had, if not nil. It must not block.
	Failed func(error)
}

// MissingStats is what became of pages that were missing, in bytes.
type MissingStats struct {
	Waiting uint64 // not there yet
	Copied  uint64 // fetched
	Faults  uint64 // how often a guest had to wait, a number
}

// Missing fetches pages of guest memory when they are touched, and in the end all
// of them: anonymous memory whose bytes are still elsewhere.
//
//	vCPU touches a hole --> kernel --userfaultfd--> serve --+
//	a device, the VMM ----> View ------> ensure ------------+--> fill: read, place
//	in the background ----> Run ----------------------------+        (UFFDIO_COPY)
//
// It works by large frames: a frame with a page that waits is registered whole,
// so far as no file is mapped there, and is complete when its last such page has
// come; its other holes are then the page of zeros. Nothing maps a registered
// frame with a huge page before that: a fault in it is never served with one
// (do_huge_pmd_anonymous_page asks userfaultfd first), UFFDIO_COPY makes small
// pages, and khugepaged and MADV_COLLAPSE refuse a frame with holes (neither is
// there need of MADV_NOHUGEPAGE, which would have to be undone). A complete frame
// has no holes: it stays registered, since to unregister it would disarm it, and
// the book of frames is told that it may be large.
//
// Whoever reads a page does so without a lock, and places it under mu only if it
// still waits: so a page that was given back meanwhile stays zeros. Giving back
// pages of a frame completes and unregisters it first ([Missing.forget]), since a
// new hole in it would be a fault that Go code might take.
type Missing struct {
	space   *Space
	fault   *userfault
	source  PageSource
	options MissingOptions
	buffers sync.Pool
	stop    int // an eventfd that ends the server
	served  sync.WaitGroup
	closed  atomic.Bool

	// Changed under mu, read by everybody.
	mu         sync.Mutex
	registered *PageSet // with the userfaultfd, for missing pages
	holes      *PageSet // of these, without a page
	waiting    *PageSet // of these, with bytes in the source
	armed      *PageSet // of these, with a tracker that is to hear of writes from now on
	failed     *PageSet // nobody can have them
	open       atomic.Int64
	left       atomic.Int64 // pages that wait
	broken     atomic.Pointer[error]

	touched atomic.Pointer[PageSet] // what was asked for, while that is recorded
	copied  atomic.Uint64
	faults  atomic.Uint64
}

// fillPages bounds how many pages are read at once: 256 KiB.
const fillPages = 64

// OpenMissing lets pages wait for their bytes, of which source is asked; the set
// belongs to the service then. They are not populated and no file is mapped over
// them. The error wraps [ErrNotPrivate] or [ErrUnsupported] where that cannot be
// done, and the caller has to fill them itself.
func (s *Space) OpenMissing(source PageSource, waiting *PageSet, o MissingOptions) (*Missing, error) {
	if s.config.Backing != Anonymous || s.hostPageSize() != PageSize {
		return nil, fmt.Errorf("fetch missing pages: %w", ErrNotPrivate)
	}
	fault, err := s.openFault()
	if err != nil {
		return nil, fmt.Errorf("fetch missing pages: %w: Linux 6.7 or newer is needed, and a sandbox that allows userfaultfd: %w", ErrUnsupported, err)
	}
	m := &Missing{
		space: s, fault: fault, source: source, options: o, stop: -1,
		waiting: waiting, armed: s.NewPageSet(), failed: s.NewPageSet(),
	}
	m.buffers.New = func() any { b := make([]byte, fillPages*PageSize); return &b }
	err = m.begin()
	if err != nil {
		return nil, errors.Join(fmt.Errorf("fetch missing pages: %w", err), m.Close())
	}
	return m, nil
}

func (m *Missing) begin() error {
	if !m.fault.kernel {
		return fmt.Errorf("%w: faults that KVM takes can be served by root or with access to %s only, or with sysctl vm.unprivileged_userfaultfd=1", ErrUnsupported, userfaultDevice)
	}
	if err := m.choose(); err != nil {
		return err
	}
	if m.options.TrackWrites {
		if err := m.space.trackWrites(); err != nil {
			return err
		}
	}
	m.space.remaps.mu.Lock()
	mode := uint64(uffdRegisterModeMissing)
	if m.space.fault.writes {
		mode |= uffdRegisterModeWP
	}
	err := m.registerAll(mode)
	m.space.remaps.mu.Unlock()
	if err != nil {
		return err
	}
	if m.stop, err = unix.Eventfd(0, unix.EFD_CLOEXEC); err != nil {
		return fmt.Errorf("eventfd: %w", err)
	}
	m.served.Go(m.serve)
	m.space.missing.Store(m)
	if m.space.book.Load() != nil {
		for run := range m.registered.Runs() {
			m.space.settle(run)
		}
	}
	return nil
}

// choose fills in the sets: frames with pages that wait are registered.
func (m *Missing) choose() error {
	if !m.waiting.over(m.space.regions) {
		return fmt.Errorf("pages of another memory: %w", unix.EINVAL)
	}
	m.registered, m.holes = m.waiting.frames(), m.waiting.frames()
	if files := m.space.remaps.files.Load(); files != nil {
		if files.meets(m.waiting) {
			return fmt.Errorf("pages that are mapped from a file cannot be missing: %w", unix.EINVAL)
		}
		m.registered.without(files)
		m.holes.without(files)
	}
	m.open.Store(int64(m.holes.Count()))
	m.left.Store(int64(m.waiting.Count()))
	return nil
}

// registerAll registers what is to be registered.
//
// Preconditions: remaps.mu is held for writing.
func (m *Missing) registerAll(mode uint64) error {
	for run := range m.registered.Runs() {
		if err := m.fault.register(m.hva(run.Start), uintptr(run.Size), mode); err != nil {
			return err
		}
	}
	return nil
}

// hva returns the host address of guest memory.
func (m *Missing) hva(gpa GPA) uintptr {
	r := m.space.find(gpa, 1)
	return uintptr(r.HVA) + uintptr(gpa-r.Start)
}

// Close ends the service. Nobody touches guest memory any more, unless nothing is
// missing. Twice is once.
func (m *Missing) Close() error {
	if m.closed.Swap(true) {
		return nil
	}
	var errs []error
	if m.stop >= 0 {
		_, err := unix.Write(m.stop, []byte{1, 0, 0, 0, 0, 0, 0, 0})
		m.served.Wait()
		errs = append(errs, err, unix.Close(m.stop))
		m.stop = -1
	}
	m.space.missing.CompareAndSwap(m, nil)
	return errors.Join(append(errs, m.space.closeFault())...)
}

// Stats returns what became of the pages.
func (m *Missing) Stats() MissingStats {
	return MissingStats{
		Waiting: uint64(m.left.Load()) * PageSize,
		Copied:  m.copied.Load() * PageSize,
		Faults:  m.faults.Load(),
	}
}

// Source is where the bytes come from.
func (m *Missing) Source() PageSource { return m.source }

// Done reports whether no page waits any more.
func (m *Missing) Done() bool { return m.left.Load() == 0 }

// Record begins to note which pages the guest and its devices ask for.
func (m *Missing) Record() { m.touched.CompareAndSwap(nil, m.space.NewPageSet()) }

// Recorded ends that and returns the pages, nil if it had not begun.
func (m *Missing) Recorded() *PageSet { return m.touched.Swap(nil) }

// note notes that pages were asked for, as far as they wait. Who reads much looks
// at memory, and is not the guest.
func (m *Missing) note(r Range) {
	t := m.touched.Load()
	if t == nil || r.Size >= LargeFrameSize {
		return
	}
	_ = m.waiting.spans(r, func(run Range, waits bool) error {
		if waits {
			t.Add(run.Start, run.Size)
		}
		return nil
	})
}

// Run fetches what waits, in the order of addresses, at most rate bytes a second
// or as fast as it goes when that is 0, until nothing waits or ctx ends. Pages
// that cannot be had are passed over, and are an error in the end.
func (m *Missing) Run(ctx context.Context, rate uint64) error {
	began, bytes := time.Now(), uint64(0)
	var failed error
	for i := range m.space.regions {
		r := m.space.regions[i].Range
		for at := m.waiting.next(r.Start, r.End(), true); at < r.End(); at = m.waiting.next(at, r.End(), true) {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			run := m.run(at, r.End())
			if err := m.fill(run); err != nil && failed == nil {
				failed = err
			}
			at, bytes = run.End(), bytes+run.Size
			if rate == 0 {
				continue
			}
			due := time.Duration(float64(bytes) / float64(rate) * float64(time.Second))
			if err := sleep(ctx, due-time.Since(began)); err != nil {
				return err
			}
		}
	}
	return failed
}

func sleep(ctx context.Context, d time.Duration) error {
	if d <= 0 {
		return nil
	}
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}

// run returns the pages that wait from one that does on, up to end and as many as
// are read at once. They do not cross the border of a frame.
func (m *Missing) run(at, end GPA) Range {
	end = min(end, at+fillPages*PageSize, at&^(LargeFrameSize-1)+LargeFrameSize)
	return Range{Start: at, Size: uint64(m.waiting.next(at, end, false) - at)}
}

// Fetch fetches what waits of r.
func (m *Missing) Fetch(ctx context.Context, r Range) error {
	for at := m.waiting.next(r.Start, r.End(), true); at < r.End(); at = m.waiting.next(at, r.End(), true) {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		run := m.run(at, r.End())
		if err := m.fill(run); err != nil {
			return err
		}
		at = run.End()
	}
	return nil
}

// ensure makes sure that Go code can touch [gpa, gpa+n), which lies in one
// region.
func (m *Missing) ensure(gpa GPA, n uint64) error {
	if m.open.Load() == 0 && m.broken.Load() == nil || n == 0 {
		return nil
	}
	start := gpa &^ (PageSize - 1)
	r := Range{Start: start, Size: (uint64(gpa-start) + n + PageSize - 1) &^ (PageSize - 1)}
	if m.failed.CountIn(r.Start, r.Size) > 0 {
		return *m.broken.Load()
	}
	noted := false
	for at := m.holes.next(r.Start, r.End(), true); at < r.End(); at = m.holes.next(at, r.End(), true) {
		if !noted {
			m.note(r)
			noted = true
		}
		if !m.waiting.Has(at) {
			if err := m.zero(Range{Start: at, Size: uint64(m.waiting.next(at, r.End(), true) - at)}); err != nil {
				return err
			}
			continue
		}
		run := m.run(at, r.End())
		if err := m.fill(run); err != nil {
			return m.fail(run, err)
		}
	}
	return nil
}

// fill reads pages and places those that still wait then. Of many pages, one
// that cannot be read does not keep the others away.
func (m *Missing) fill(run Range) error {
	buf, ok := m.buffers.Get().(*[]byte)
	if !ok {
		return errors.New("no buffer")
	}
	defer m.buffers.Put(buf)
	err := m.fetch(run, (*buf)[:run.Size])
	if err == nil || run.Size == PageSize {
		return err
	}
	var failed error
	for gpa := run.Start; gpa < run.End(); gpa += PageSize {
		if err := m.fetch(Range{Start: gpa, Size: PageSize}, (*buf)[:PageSize]); err != nil && failed == nil {
			failed = err
		}
	}
	return failed
}

// fetch reads and places pages. Two may fetch the same, and a source need not have
// twice what came: an error about pages of which none waits any more is none.
func (m *Missing) fetch(run Range, buf []byte) error {
	if err := m.source.ReadPages(run.Start.GFN(), buf); err != nil {
		if m.waiting.CountIn(run.Start, run.Size) == 0 {
			return nil
		}
		return err
	}
	if err := m.place(run, buf); err != nil {
		return err
	}
	return m.complete(run)
}
