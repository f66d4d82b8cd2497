package memory

import (
	"errors"
	"fmt"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// population tells which pages the host holds. The file is opened with the
// Space, since a process that has given up its rights cannot open it any more.
type population struct {
	file *os.File // /proc/self/pagemap, nil when it cannot be had
	err  error    // why not
	bufs sync.Pool
}

func openPopulation() population {
	f, err := os.Open("/proc/self/pagemap")
	return population{file: f, err: err}
}

func (p *population) close() error {
	f := p.file
	if f == nil {
		return nil
	}
	p.file, p.err = nil, os.ErrClosed
	return f.Close()
}

// Populated calls visit with the runs of pages of r that may hold something, in
// ascending order. The rest reads as zeros: pages that were never touched, that
// were discarded, or that the host maps to its page of zeros. No page is touched
// to find out, so none becomes populated. It may be called from any goroutine.
//
// Pages of files that are mapped and pages that are missing hold something.
func (s *Space) Populated(r Range, visit func(Range)) error {
	p, err := s.locate(r)
	switch {
	case err != nil:
	case r.Size == 0:
	case s.config.Backing == Memfd && s.hostPageSize() == PageSize:
		err = p.region.populatedFile(r, visit)
	case s.config.Backing == Memfd:
		// The pages may have come through another process's mapping, which
		// this one's page tables do not show.
		visit(r)
	default:
		err = s.populatedAnonymous(p, visit)
	}
	if err != nil {
		return fmt.Errorf("populated pages of [%s, +%#x): %w", r.Start, r.Size, err)
	}
	return nil
}

// populatedAnonymous joins what the host has pages for with what it has not. That
// comes first: what is missing may arrive meanwhile.
func (s *Space) populatedAnonymous(p part, visit func(Range)) error {
	if !s.remapped() {
		return s.populatedPages(p, visit)
	}
	all := NewPageSet([]Range{p.Range})
	s.latent(p.Range, all)
	if err := s.populatedPages(p, func(r Range) { all.Add(r.Start, r.Size) }); err != nil {
		return err
	}
	for r := range all.Runs() {
		visit(r)
	}
	return nil
}

// populatedScan asks for what is populated and not the page of zeros.
var populatedScan = scanQuery{
	mask: pageIsPFNZero, inverted: pageIsPFNZero,
	anyOf: pageIsPresent | pageIsSwapped,
}

// populatedPages asks the page tables of this process.
func (s *Space) populatedPages(p part, visit func(Range)) error {
	if s.population.file == nil {
		return s.population.err
	}
	buf, ok := s.population.bufs.Get().(*[]pageRegion)
	if !ok {
		buf = new([]pageRegion)
		*buf = make([]pageRegion, populatedRuns)
	}
	defer s.population.bufs.Put(buf)
	pages := pagemap{fd: int(s.population.file.Fd()), buf: *buf}
	err := pages.scan(p.hva(p.Start), p.hva(p.End()), populatedScan, func(start, end uintptr, _ uint64) {
		visit(Range{Start: p.gpa(start), Size: uint64(end - start)})
	})
	if errors.Is(err, unix.ENOTTY) {
		return s.populatedEntries(p, visit)
	}
	return err
}

// populatedRuns is how many runs one call may return: 12 KiB of buffer.
const populatedRuns = 512

// Bits of an entry of /proc/self/pagemap.
const (
	entryPresent = 1 << 63
	entrySwapped = 1 << 62
)

// populatedEntries does without PAGEMAP_SCAN, before Linux 6.7. It takes the
// page of zeros for a page that holds something.
func (s *Space) populatedEntries(p part, visit func(Range)) error {
	return s.eachEntry(p, func(e uint64) bool { return e&(entryPresent|entrySwapped) != 0 }, visit)
}

func visitRun(r Range, visit func(Range)) {
	if r.Size > 0 {
		visit(r)
	}
}

// populatedFile asks the file behind the region: its pages stay when the host
// takes them out of this process's page tables.
func (r *Region) populatedFile(part Range, visit func(Range)) error {
	base := r.Offset - int64(r.Start)
	for at := part.Start; at < part.End(); {
		data, err := unix.Seek(r.FD, base+int64(at), unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil // no more data
		}
		if err != nil {
			return err
		}
		if data-base >= int64(part.End()) {
			return nil
		}
		hole, err := unix.Seek(r.FD, data, unix.SEEK_HOLE)
		if err != nil {
			return err
		}
		end := min(GPA(hole-base), part.End())
		visit(Range{Start: GPA(data - base), Size: uint64(end) - uint64(data-base)})
		at = end
	}
	return nil
}
