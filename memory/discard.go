package memory

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Discard gives the pages of [gpa, gpa+n) back to the host; they read as zeros
// afterwards. The range is shrunk to whole host pages, which with hugetlbfs are
// whole frames, so less than what was asked for may be given back. The observer
// hears of the part that was.
func (s *Space) Discard(gpa GPA, n uint64) error {
	r := s.find(gpa, n)
	if r == nil {
		return fmt.Errorf("discard [%s, +%#x): %w", gpa, n, ErrOutOfRange)
	}
	page := s.hostPageSize()
	start := (uint64(gpa) + page - 1) &^ (page - 1)
	end := (uint64(gpa) + n) &^ (page - 1)
	if start >= end {
		return nil
	}
	if err := s.discard(r, Range{Start: GPA(start), Size: end - start}); err != nil {
		return fmt.Errorf("discard [%s, +%#x): %w", gpa, n, err)
	}
	s.Wrote(GPA(start), end-start)
	return nil
}

// Clear gives all pages back to the host: RAM as at power-on.
func (s *Space) Clear() error {
	if s.remapped() {
		return s.mapAnew()
	}
	var errs []error
	for i := range s.regions {
		errs = append(errs, s.Discard(s.regions[i].Start, s.regions[i].Size))
	}
	return errors.Join(errs...)
}

// hostPageSize is the unit in which the host can take memory back.
func (s *Space) hostPageSize() uint64 {
	switch s.config.HugePages {
	case HugePages2M:
		return LargeFrameSize
	case HugePages1G:
		return HugeFrameSize
	}
	return PageSize
}

// discard drops pages of a region. Pages that are missing are not any more, and
// files are mapped no more where they were.
func (s *Space) discard(r *Region, pages Range) error {
	if m := s.missing.Load(); m != nil {
		if err := m.forget(pages); err != nil {
			return err
		}
	}
	files := s.remaps.files.Load()
	if files == nil {
		return r.discard(pages, s.draft.Load())
	}
	err := files.spans(pages, func(run Range, mapped bool) error {
		if mapped {
			return s.unmapFile(r, run)
		}
		return r.discard(run, s.draft.Load())
	})
	s.settle(pages)
	return err
}

// discard drops pages that no file is mapped over; with draft only what this
// process has written to them.
func (r *Region) discard(pages Range, draft bool) error {
	off := uint64(pages.Start - r.Start)
	if r.FD >= 0 && !draft {
		return unix.Fallocate(r.FD, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, r.Offset+int64(off), int64(pages.Size))
	}
	return unix.Madvise(r.part(pages), unix.MADV_DONTNEED)
}
