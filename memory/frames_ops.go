package memory

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Break makes the frame at gpa small for the given reason, so that single pages
// of it can be freed, shared or remapped. What is armed stays armed. An empty
// frame only gets the reason.
func (f *Frames) Break(gpa GPA, why FrameReasons) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.breakFrame(gpa, why&reasonsTold); err != nil {
		return &FrameError{Op: "break", GPA: gpa, Err: err}
	}
	return nil
}

func (f *Frames) breakFrame(gpa GPA, why FrameReasons) error {
	region, n, err := f.locate(gpa)
	if err != nil {
		return err
	}
	mem := f.space.regions[region].frame(n)
	huge, err := f.pages.isHuge(f.space.regions[region].frameHVA(n))
	if err != nil {
		return err
	}
	if huge {
		err = f.split(region, n, mem[:PageSize])
	}
	f.regions[region][n] |= frameByte(why)
	return errors.Join(err, f.refresh(region, n, n+1))
}

// split breaks a huge page by an operation on one of its small pages: one over
// the whole of it would leave it huge. MADV_COLD splits the page itself, so that
// what is later dropped from it is free at once, and leaves the VMA alone. While
// I/O has a page pinned the kernel does not split it, and changing a flag of one
// page's VMA then at least splits the mapping.
func (f *Frames) split(region, n int, onePage []byte) error {
	hva := f.space.regions[region].frameHVA(n)
	if err := unix.Madvise(onePage, unix.MADV_COLD); err == nil {
		if huge, err := f.pages.isHuge(hva); err != nil || !huge {
			return err
		}
	}
	if err := unix.Madvise(onePage, unix.MADV_NOHUGEPAGE); err != nil {
		return fmt.Errorf("split the mapping: %w", err)
	}
	if err := unix.Madvise(onePage, unix.MADV_HUGEPAGE); err != nil {
		return fmt.Errorf("join the mapping: %w", err)
	}
	huge, err := f.pages.isHuge(hva)
	if err == nil && huge {
		err = ErrFrameBusy
	}
	return err
}

// Collapse makes the frame at gpa large again. It is refused with
// [ErrFrameHeld] while an owner's reason stands or when more than fill of its
// pages are missing; up to that many are populated with zeros first. Armed pages
// are disarmed and the whole frame counts as written afterwards: whoever tracks
// it collects before and arms after.
func (f *Frames) Collapse(gpa GPA, fill int) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.collapse(gpa, fill); err != nil {
		return &FrameError{Op: "collapse", GPA: gpa, Err: err}
	}
	return nil
}

// collapseTries: a page counts as busy for a moment after it was read, written or
// split, while another core keeps it in a list of its own.
const collapseTries = 5

func (f *Frames) collapse(gpa GPA, fill int) error {
	region, n, err := f.locate(gpa)
	if err != nil {
		return err
	}
	if err := f.refresh(region, n, n+1); err != nil {
		return err
	}
	b := f.regions[region][n]
	if why := b.reasons() & reasonsTold; why != 0 {
		return fmt.Errorf("%w: %s", ErrFrameHeld, why)
	}
	if b.state() != FrameSmall {
		return nil
	}
	mem := f.space.regions[region].frame(n)
	if b.reasons()&ReasonPartial != 0 {
		if err := f.fill(region, n, mem, fill); err != nil {
			return err
		}
	}
	if b.reasons()&ReasonTracking != 0 {
		if err := f.tracker.Disarm(Range{Start: gpa, Size: LargeFrameSize}); err != nil {
			return err
		}
	}
	for range collapseTries {
		err = collapseError(unix.Madvise(mem, unix.MADV_COLLAPSE))
		if !errors.Is(err, ErrFrameBusy) {
			break
		}
	}
	return errors.Join(err, f.refresh(region, n, n+1))
}

// fill populates the missing pages of a frame when they are few enough.
func (f *Frames) fill(region, n int, mem []byte, most int) error {
	missing := pagesPerFrame
	hva := f.space.regions[region].frameHVA(n)
	err := f.pages.scan(hva, hva+LargeFrameSize, frameScan, func(start, end uintptr, _ uint64) {
		missing -= int(end-start) / PageSize
	})
	if err != nil {
		return err
	}
	if missing > most {
		return fmt.Errorf("%w: %d pages are missing", ErrFrameHeld, missing)
	}
	if err := unix.Madvise(mem, unix.MADV_POPULATE_WRITE); err != nil {
		return fmt.Errorf("populate %d pages: %w", missing, err)
	}
	return nil
}

// collapseError tells the errors of MADV_COLLAPSE apart (madvise(2)).
func collapseError(err error) error {
	switch {
	case err == nil:
		return nil
	case errors.Is(err, unix.ENOMEM):
		return fmt.Errorf("%w: %w", ErrNoHugePage, err)
	case errors.Is(err, unix.EAGAIN), errors.Is(err, unix.EBUSY):
		return fmt.Errorf("%w: %w", ErrFrameBusy, err)
	}
	return fmt.Errorf("MADV_COLLAPSE: %w", err)
}

// locate returns region and number of the frame at gpa, of memory whose page
// size can change.
func (f *Frames) locate(gpa GPA) (region, n int, err error) {
	if f.space.config.HugePages != HugePagesTHP {
		return 0, 0, ErrFrameFixed
	}
	if uint64(gpa)%LargeFrameSize != 0 {
		return 0, 0, ErrNotAFrame
	}
	for i := range f.space.regions {
		if r := &f.space.regions[i]; r.Contains(gpa, LargeFrameSize) {
			return i, int(uint64(gpa-r.Start) / LargeFrameSize), nil
		}
	}
	return 0, 0, ErrNotAFrame
}

// frame returns the memory of the region's nth frame.
func (r *Region) frame(n int) []byte {
	off := uint64(n) * LargeFrameSize
	return r.mem[off : off+LargeFrameSize : off+LargeFrameSize]
}

func (r *Region) frameHVA(n int) uintptr { return uintptr(r.HVA) + uintptr(n)*LargeFrameSize }
