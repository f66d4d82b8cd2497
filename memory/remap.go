package memory

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"
)

// FileRange is a part of a file that is to be guest memory.
type FileRange struct {
	Range
	File *os.File
	// Offset is where the range begins in the file, in bytes: a multiple of a
	// page.
	Offset int64
}

// remaps is what a Space knows of the files that are mapped over it.
type remaps struct {
	// mu is held for writing while mappings and their registration with
	// userfaultfd change, and for reading by those who rely on both.
	mu sync.RWMutex
	// files are the pages that are mapped from files, written or not; nil while
	// none ever was.
	files atomic.Pointer[PageSet]
	// added counts by how many mappings discards have raised the number.
	added int
}

// mostHoles bounds how many mappings a guest can cause by giving back single
// pages of mapped files: a process has 65530 unless vm.max_map_count says else.
const mostHoles = 16384

// MapFiles maps parts of files privately over guest memory: what the guest reads
// is the files' page cache, what it writes its own. The files must not change
// while they are mapped: a write to one would change guest memory, and unnoticed.
// They may be closed.
//
// Host addresses stay, and KVM follows by itself. A range that is given back
// later is zeros, and no file's any more. It is for anonymous memory; after an
// error the ranges hold anything.
func (s *Space) MapFiles(ranges ...FileRange) error {
	if s.config.Backing != Anonymous || s.hostPageSize() != PageSize {
		return fmt.Errorf("map files over guest memory: %w", ErrNotPrivate)
	}
	files := s.remaps.files.Load()
	if files == nil {
		files = s.NewPageSet()
		s.remaps.files.Store(files)
	}
	parts := make([]part, len(ranges))
	sizes := make(map[*os.File]int64)
	for i, r := range ranges {
		var err error
		if parts[i], err = s.locate(r.Range); err == nil {
			err = r.check(sizes)
		}
		if m := s.missing.Load(); m != nil && m.registered.CountIn(r.Start, r.Size) > 0 {
			err = fmt.Errorf("pages are missing there: %w", unix.EBUSY)
		}
		if err != nil {
			return fmt.Errorf("map a file at %s: %w", r.Start, err)
		}
	}
	if err := s.mapFiles(ranges, parts, files); err != nil {
		return err
	}
	for _, r := range ranges {
		if err := s.toldRemapped(r.Range); err != nil {
			return err
		}
	}
	return nil
}

// ErrNotPrivate says that memory cannot be mapped from files, or be filled page by
// page: it must be private to the process and made of small pages.
var ErrNotPrivate = errors.New("it is not anonymous memory of small pages")

// check checks that the file has what is to be mapped: a page beyond its end
// cannot be touched.
func (r *FileRange) check(sizes map[*os.File]int64) error {
	size, ok := sizes[r.File]
	if !ok {
		info, err := r.File.Stat()
		if err != nil {
			return err
		}
		if size = info.Size(); !info.Mode().IsRegular() {
			size = -1
		}
		sizes[r.File] = size
	}
	switch {
	case r.Offset < 0 || r.Offset%PageSize != 0:
		return fmt.Errorf("offset %d of %s is not page-aligned: %w", r.Offset, r.File.Name(), unix.EINVAL)
	case size >= 0 && (r.Offset > size || int64(r.Size) > size-r.Offset):
		return fmt.Errorf("%s has %d bytes, and %d from %d on are wanted: it was cut short", r.File.Name(), size, r.Size, r.Offset)
	}
	return nil
}

func (s *Space) mapFiles(ranges []FileRange, parts []part, files *PageSet) error {
	s.remaps.mu.Lock()
	defer s.remaps.mu.Unlock()
	touched := make([]bool, len(s.regions))
	for i, r := range ranges {
		if r.Size == 0 {
			continue
		}
		err := mapOver(parts[i].region.part(r.Range), int(r.File.Fd()), r.Offset)
		if err == nil {
			files.Add(r.Start, r.Size)
			touched[parts[i].index] = true
			err = s.registerWrites(parts[i])
		}
		if err != nil {
			return fmt.Errorf("map %d bytes of %s at %s: %w", r.Size, r.File.Name(), r.Start, err)
		}
	}
	for i, t := range touched {
		if t {
			advisePrivate(s.regions[i].mem)
		}
	}
	return nil
}

// unmapFile makes pages of files anonymous memory again, of zeros. When single
// pages have taken too many mappings, zeros are written instead.
func (s *Space) unmapFile(r *Region, pages Range) error {
	s.remaps.mu.Lock()
	err := s.mapZeros(r, pages)
	s.remaps.mu.Unlock()
	if errors.Is(err, unix.ENOMEM) {
		clear(r.part(pages))
		return nil
	}
	if err != nil {
		return err
	}
	return s.toldRemapped(pages)
}

// mapZeros maps anonymous memory over pages of files. The error wraps ENOMEM when
// there is no room for more mappings.
//
// Preconditions: remaps.mu is held.
func (s *Space) mapZeros(r *Region, pages Range) error {
	files := s.remaps.files.Load()
	// The new mapping joins its neighbours, unless they are files.
	added := -1
	for _, outer := range []GPA{pages.Start - PageSize, pages.End()} {
		if files.Has(outer) {
			added++
		}
	}
	if s.remaps.added+added > mostHoles {
		return fmt.Errorf("%d mappings by pages given back: %w", s.remaps.added, unix.ENOMEM)
	}
	mem := r.part(pages)
	if err := mapOver(mem, -1, 0); err != nil {
		return err
	}
	files.Remove(pages.Start, pages.Size)
	s.remaps.added = max(0, s.remaps.added+added)
	adviseHugePages(mem, s.config)
	advisePrivate(mem)
	p, err := s.locate(pages)
	if err != nil {
		return err
	}
	return s.registerWrites(p)
}

// remapped reports whether files are mapped, or were, or pages are missing.
func (s *Space) remapped() bool {
	return s.remaps.files.Load() != nil || s.missing.Load() != nil
}

// mapAnew makes all of memory anonymous and empty again.
func (s *Space) mapAnew() error {
	remap := func() error {
		var errs []error
		for i := range s.regions {
			errs = append(errs, s.mapRegionAnew(i))
		}
		return errors.Join(errs...)
	}
	var errs []error
	if m := s.missing.Load(); m != nil {
		errs = append(errs, m.abandon(remap))
	} else {
		errs = append(errs, remap())
	}
	for i := range s.regions {
		r := s.regions[i].Range
		errs = append(errs, s.toldRemapped(r))
		s.Wrote(r.Start, r.Size)
	}
	return errors.Join(errs...)
}

func (s *Space) mapRegionAnew(i int) error {
	s.remaps.mu.Lock()
	defer s.remaps.mu.Unlock()
	r := &s.regions[i]
	if err := mapOver(r.mem, -1, 0); err != nil {
		return fmt.Errorf("empty memory at %s: %w", r.Start, err)
	}
	if files := s.remaps.files.Load(); files != nil {
		files.Remove(r.Start, r.Size)
	}
	s.remaps.added = 0
	adviseHugePages(r.mem, s.config)
	advisePrivate(r.mem)
	return s.registerWrites(part{region: r, index: i, Range: r.Range})
}

// remapObserver is an observer that must know of new mappings: a [Tracker].
type remapObserver interface{ Remapped(r Range) error }

// toldRemapped tells the tracker and the book of frames of a new mapping.
func (s *Space) toldRemapped(r Range) error {
	s.settle(r)
	if o := s.observer.Load(); o != nil {
		if t, ok := o.WriteObserver.(remapObserver); ok {
			return t.Remapped(r)
		}
	}
	return nil
}

// settle tells the book of frames which of the frames that r touches must stay
// small because of what is mapped or missing there.
func (s *Space) settle(r Range) {
	book := s.book.Load()
	if book == nil {
		return
	}
	for gpa := r.Start &^ (LargeFrameSize - 1); gpa < r.End(); gpa += LargeFrameSize {
		frame := Range{Start: gpa, Size: LargeFrameSize}
		if s.foreign(frame) {
			book.Hold(frame, ReasonRemap)
		} else {
			book.Settle(frame, ReasonRemap)
		}
	}
}

// foreign reports whether pages of r are a file's, or missing.
func (s *Space) foreign(r Range) bool {
	if files := s.remaps.files.Load(); files != nil && files.CountIn(r.Start, r.Size) > 0 {
		return true
	}
	m := s.missing.Load()
	return m != nil && m.holes.CountIn(r.Start, r.Size) > 0
}

// latent adds to a set the pages of r that hold something although the host may
// have no page for them in this process: those of files, and those that are
// missing.
func (s *Space) latent(r Range, into *PageSet) {
	add := func(run Range, in bool) error {
		if in {
			into.Add(run.Start, run.Size)
		}
		return nil
	}
	if m := s.missing.Load(); m != nil {
		_ = m.waiting.spans(r, add)
	}
	if files := s.remaps.files.Load(); files != nil {
		_ = files.spans(r, add)
	}
}

// part returns the memory of pages of the region.
func (r *Region) part(pages Range) []byte {
	off := uint64(pages.Start - r.Start)
	return r.mem[off : off+pages.Size : off+pages.Size]
}

// Prefault brings the pages of r that are mapped from files into memory, before
// the guest asks for them. Large reads of what is not in the page cache are begun
// for all of r at once.
func (s *Space) Prefault(r Range) error {
	files := s.remaps.files.Load()
	if files == nil {
		return nil
	}
	p, err := s.locate(r)
	if err != nil {
		return fmt.Errorf("prefault: %w", err)
	}
	for _, advice := range []int{unix.MADV_WILLNEED, unix.MADV_POPULATE_READ} {
		err := files.spans(r, func(run Range, mapped bool) error {
			if !mapped {
				return nil
			}
			return unix.Madvise(p.region.part(run), advice)
		})
		if err != nil {
			return fmt.Errorf("prefault [%s, +%#x): %w", r.Start, r.Size, err)
		}
	}
	return nil
}

// FilesTouched calls visit with the pages mapped from files that somebody has
// touched, in ascending order. Unless the tracker is wp-async, the kernel takes
// neighbours of such pages for touched too.
func (s *Space) FilesTouched(visit func(Range)) error {
	files := s.remaps.files.Load()
	if files == nil {
		return nil
	}
	for i := range s.regions {
		r := &s.regions[i]
		err := s.populatedPages(part{region: r, index: i, Range: r.Range}, func(present Range) {
			_ = files.spans(present, func(run Range, mapped bool) error {
				if mapped {
					visit(run)
				}
				return nil
			})
		})
		if err != nil {
			return fmt.Errorf("pages of files that were touched: %w", err)
		}
	}
	return nil
}
