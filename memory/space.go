package memory

import (
	"errors"
	"fmt"
	"sync/atomic"
)

// ErrOutOfRange is wrapped by every access that does not lie inside one RAM
// region.
var ErrOutOfRange = errors.New("outside guest RAM")

// Config says how large guest memory is and what backs it.
type Config struct {
	Size      uint64 // bytes
	Backing   Backing
	HugePages HugePages
}

// Region is one contiguous range of RAM and its host mapping: one memslot.
type Region struct {
	Range
	Slot uint32
	HVA  HVA
	// FD is the memfd or hugetlbfs file behind the region, or -1.
	FD int
	// Offset is where the region starts in FD, in bytes.
	Offset int64

	mem []byte // the whole mapping, len(mem) == Size
}

// Space is the RAM of one guest. Reads and writes may come from any goroutine;
// the guest races with all of them.
type Space struct {
	size       uint64
	config     Config
	regions    []Region
	mappings   []mapping
	population population
	observer   atomic.Pointer[observerBox]
	fault      sharedFault
	remaps     remaps
	missing    atomic.Pointer[Missing]
	book       atomic.Pointer[Frames]
	// draft: the memory is another process's still, and mapped privately.
	draft atomic.Bool
}

// observerBox lets an interface value sit behind an atomic pointer.
type observerBox struct{ WriteObserver }

// New maps guest memory. It fails with a hint when the hugetlbfs pool is too
// small or the size does not fit the page size.
func New(config Config) (*Space, error) {
	ranges, err := Layout(config.Size)
	if err != nil {
		return nil, err
	}
	s := &Space{size: config.Size, config: config, population: openPopulation()}
	for i, r := range ranges {
		if hugetlb := config.HugePages == HugePages2M || config.HugePages == HugePages1G; hugetlb && r.Size%config.HugePages.frameSize() != 0 {
			_ = s.Close()
			return nil, fmt.Errorf("memory size %d is not a multiple of the %s huge page size", config.Size, config.HugePages)
		}
		m, err := mapRegion(r, config)
		if err != nil {
			_ = s.Close()
			return nil, fmt.Errorf("map %d bytes of guest memory at %s: %w", r.Size, r.Start, err)
		}
		s.mappings = append(s.mappings, m)
		s.regions = append(s.regions, Region{
			Range: r, Slot: uint32(i), HVA: m.hva(), FD: m.fd, mem: m.bytes(),
		})
	}
	return s, nil
}

// Close unmaps the memory. No slice obtained from the Space may be used after.
func (s *Space) Close() error {
	errs := []error{s.population.close()}
	for _, m := range s.mappings {
		errs = append(errs, m.close())
	}
	s.mappings, s.regions = nil, nil
	return errors.Join(errs...)
}

// Size returns the bytes of RAM.
func (s *Space) Size() uint64 { return s.size }

// Config returns what the Space was made from.
func (s *Space) Config() Config { return s.config }

// Regions returns the RAM regions in ascending order. The slice is shared and
// must not be changed.
func (s *Space) Regions() []Region { return s.regions }

// SetObserver installs the observer of host writes, nil for none.
func (s *Space) SetObserver(o WriteObserver) {
	if o == nil {
		s.observer.Store(nil)
		return
	}
	s.observer.Store(&observerBox{o})
}

// Wrote reports that the VMM changed [gpa, gpa+n) through a slice from
// [Space.Writable] or by a system call. Call it before the guest is told.
func (s *Space) Wrote(gpa GPA, n uint64) {
	if o := s.observer.Load(); o != nil && n > 0 {
		o.HostWrite(gpa, n)
	}
}

// Contains reports whether [gpa, gpa+n) lies inside one region.
func (s *Space) Contains(gpa GPA, n uint64) bool {
	return s.find(gpa, n) != nil
}

// View returns guest memory for reading. The slice aliases what the guest
// writes: copy what must not change under the reader.
//
// Pages that are missing are fetched first. Go code never takes a fault on one: a
// thread that does cannot be stopped for a collection of garbage, and whoever
// serves the fault would be.
func (s *Space) View(gpa GPA, n uint64) ([]byte, error) {
	r := s.find(gpa, n)
	if r == nil {
		return nil, fmt.Errorf("[%s, +%#x): %w", gpa, n, ErrOutOfRange)
	}
	if m := s.missing.Load(); m != nil {
		if err := m.ensure(gpa, n); err != nil {
			return nil, err
		}
	}
	off := uint64(gpa - r.Start)
	return r.mem[off : off+n : off+n], nil
}

// Writable returns guest memory for writing. The caller reports what it wrote
// with [Space.Wrote].
func (s *Space) Writable(gpa GPA, n uint64) ([]byte, error) { return s.View(gpa, n) }

// ReadAt fills p from guest memory at gpa, all of it or nothing.
func (s *Space) ReadAt(p []byte, gpa GPA) error {
	src, err := s.View(gpa, uint64(len(p)))
	if err != nil {
		return fmt.Errorf("read guest memory: %w", err)
	}
	copy(p, src)
	return nil
}

// WriteAt copies p to guest memory at gpa, all of it or nothing, and reports
// the write.
func (s *Space) WriteAt(p []byte, gpa GPA) error {
	dst, err := s.View(gpa, uint64(len(p)))
	if err != nil {
		return fmt.Errorf("write guest memory: %w", err)
	}
	copy(dst, p)
	s.Wrote(gpa, uint64(len(p)))
	return nil
}

// find returns the region that holds [gpa, gpa+n), or nil.
func (s *Space) find(gpa GPA, n uint64) *Region {
	for i := range s.regions {
		if s.regions[i].Contains(gpa, n) {
			return &s.regions[i]
		}
	}
	return nil
}
