package memory

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Open maps guest memory that another process of this host has made: files holds
// its memfds in the order of the regions, which the Space owns from now on, also
// when Open fails. It checks that they are what [New] makes of config: memfds of
// the right size and size of pages, that nobody can shrink.
//
//	Open    private mappings: reads see what the files hold, and what is written
//	        is this process's alone
//	Clear   drops what was written here
//	Adopt   shared mappings: from now on writes are everybody's
//
// So nothing that is done up to Adopt can change a byte of what the other process
// still may run on: the kernel sees to it, not the caller.
func Open(config Config, files []*os.File) (*Space, error) {
	s, err := open(config, files)
	for i := range files {
		err = errors.Join(err, files[i].Close())
	}
	if err != nil {
		if s != nil {
			_ = s.Close() // the error is what counts
		}
		return nil, fmt.Errorf("guest memory of another process: %w", err)
	}
	return s, nil
}

func open(config Config, files []*os.File) (*Space, error) {
	ranges, err := Layout(config.Size)
	switch {
	case err != nil:
		return nil, err
	case config.Backing != Memfd:
		return nil, fmt.Errorf("%s memory cannot be handed over", config.Backing)
	case len(files) != len(ranges):
		return nil, fmt.Errorf("%d files for %d ranges", len(files), len(ranges))
	}
	s := &Space{size: config.Size, config: config, population: openPopulation()}
	s.draft.Store(true)
	for i, r := range ranges {
		if err := checkMemfd(files[i], int64(r.Size), config.HugePages); err != nil {
			return s, fmt.Errorf("the file of the memory at %s: %w", r.Start, err)
		}
		m, err := mapHanded(r, config, files[i])
		if err != nil {
			return s, fmt.Errorf("map %d bytes of guest memory at %s: %w", r.Size, r.Start, err)
		}
		s.mappings = append(s.mappings, m)
		s.regions = append(s.regions, Region{Range: r, Slot: uint32(i), HVA: m.hva(), FD: m.fd, mem: m.bytes()})
	}
	return s, nil
}

// sealed are the seals of a memfd of guest memory: its size stays. A page beyond
// the end of a file is a SIGBUS for who touches it.
const sealed = unix.F_SEAL_SHRINK | unix.F_SEAL_GROW

// checkMemfd refuses a file that is not as populate makes it.
func checkMemfd(f *os.File, size int64, pages HugePages) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != size {
		return fmt.Errorf("mode %#o and %d bytes instead of a memfd of %d", st.Mode, st.Size, size)
	}
	seals, err := unix.FcntlInt(f.Fd(), unix.F_GET_SEALS, 0)
	if err != nil {
		return fmt.Errorf("it is no memfd: %w", err)
	}
	if seals&sealed != sealed || seals&(unix.F_SEAL_WRITE|unix.F_SEAL_FUTURE_WRITE) != 0 {
		return fmt.Errorf("it has the seals %#x: its size must be sealed, and its bytes must not", seals)
	}
	if flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0); err != nil || flags&unix.O_ACCMODE != unix.O_RDWR {
		return errors.Join(errors.New("it cannot be read and written"), err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(f.Fd()), &fs); err != nil {
		return err
	}
	huge := map[HugePages]int64{HugePages2M: LargeFrameSize, HugePages1G: HugeFrameSize}[pages]
	switch {
	case huge == 0 && int64(fs.Type) == unix.TMPFS_MAGIC:
	case huge != 0 && int64(fs.Type) == unix.HUGETLBFS_MAGIC && int64(fs.Bsize) == huge:
	default:
		return fmt.Errorf("it is of a file system %#x with blocks of %d bytes, and has huge pages %s", fs.Type, fs.Bsize, pages)
	}
	return nil
}

// mapHanded maps a file privately where [mapRegion] maps a new one.
func mapHanded(r Range, config Config, f *os.File) (mapping, error) {
	m, err := reserve(r, config)
	if err != nil {
		return mapping{}, err
	}
	if m.fd, err = unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0); err != nil {
		m.fd = -1
		return mapping{}, errors.Join(err, m.close())
	}
	if err := m.mapFile(unix.MAP_PRIVATE|unix.MAP_NORESERVE, config); err != nil {
		return mapping{}, errors.Join(err, m.close())
	}
	return m, nil
}

// mapFile maps the memfd over the reservation, or over what was mapped there.
func (m *mapping) mapFile(flags int, config Config) error {
	// SAFETY: the address range is m's, and the file holds what is to be there.
	if _, err := unix.MmapPtr(m.fd, 0, m.start, m.size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_FIXED|flags); err != nil {
		return fmt.Errorf("mmap: %w", hugePagesHint(err, config))
	}
	adviseHugePages(m.bytes(), config)
	advisePrivate(m.bytes())
	return nil
}

// maxCarried bounds what Adopt carries over, in bytes: devices that are restored
// write a page here and there.
const maxCarried = 64 << 20

// Adopt lets writes reach the files. What was written here since [Open], or since
// the last [Space.Clear], is written there. Nobody else may use the memory, here or
// there, until it returns; after an error that is for ever. On a Space of [New] it
// does nothing.
func (s *Space) Adopt() error {
	if !s.draft.Load() {
		return nil
	}
	for i := range s.mappings {
		if err := s.adopt(&s.mappings[i], s.regions[i]); err != nil {
			return fmt.Errorf("adopt guest memory at %s: %w", s.regions[i].Start, err)
		}
	}
	s.draft.Store(false)
	return nil
}

func (s *Space) adopt(m *mapping, r Region) error {
	type page struct {
		at    uint64
		bytes []byte
	}
	var carried []page
	total := uint64(0)
	err := s.writtenHere(r, func(run Range) {
		if total += run.Size; total > maxCarried {
			return
		}
		at := uint64(run.Start - r.Start)
		carried = append(carried, page{at, append([]byte(nil), r.mem[at:at+run.Size]...)})
	})
	if err == nil && total > maxCarried {
		err = fmt.Errorf("%d bytes were written before it was adopted, more than %d", total, maxCarried)
	}
	if err != nil {
		return err
	}
	flags := unix.MAP_SHARED
	if s.hostPageSize() == PageSize {
		flags |= unix.MAP_NORESERVE
	}
	if err := m.mapFile(flags, s.config); err != nil {
		return err
	}
	for _, p := range carried {
		copy(r.mem[p.at:], p.bytes)
	}
	return nil
}

// entryFile marks pages of files in /proc/self/pagemap; a private copy of one is
// none any more.
const entryFile = 1 << 61

// writtenHere calls visit with the runs of pages that are this process's copies.
func (s *Space) writtenHere(r Region, visit func(Range)) error {
	if s.population.file == nil {
		return s.population.err
	}
	p, err := s.locate(r.Range)
	if err != nil {
		return err
	}
	pages := pagemap{fd: int(s.population.file.Fd()), buf: make([]pageRegion, populatedRuns)}
	query := scanQuery{mask: pageIsFile | pageIsPFNZero, inverted: pageIsFile | pageIsPFNZero, anyOf: pageIsPresent | pageIsSwapped}
	err = pages.scan(p.hva(p.Start), p.hva(p.End()), query, func(start, end uintptr, _ uint64) {
		visit(Range{Start: p.gpa(start), Size: uint64(end - start)})
	})
	if !errors.Is(err, unix.ENOTTY) {
		return err
	}
	return s.eachEntry(p, func(e uint64) bool { return e&(entryPresent|entrySwapped) != 0 && e&entryFile == 0 }, visit)
}

// eachEntry calls visit with the runs of pages whose entries are wanted.
func (s *Space) eachEntry(p part, wanted func(entry uint64) bool, visit func(Range)) error {
	var entries [8 * 512]byte
	run := Range{Start: p.Start}
	for gpa := p.Start; gpa < p.End(); {
		n := min(uint64(len(entries)), uint64(p.End()-gpa)>>PageShift*8)
		if _, err := s.population.file.ReadAt(entries[:n], int64(p.hva(gpa))>>PageShift*8); err != nil {
			return err
		}
		for i := uint64(0); i < n; i += 8 {
			if wanted(binary.NativeEndian.Uint64(entries[i:])) {
				run.Size += PageSize
			} else {
				visitRun(run, visit)
				run = Range{Start: run.End() + PageSize}
			}
		}
		gpa += GPA(n / 8 * PageSize)
	}
	visitRun(run, visit)
	return nil
}

// Files returns copies of the files behind the memory, in the order of the regions,
// for another process to [Open]; nil if there are none.
func (s *Space) Files() (files []*os.File, err error) {
	for _, r := range s.regions {
		if r.FD < 0 || s.draft.Load() {
			return nil, nil
		}
		fd, err := unix.FcntlInt(uintptr(r.FD), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			for _, f := range files {
				_ = f.Close()
			}
			return nil, fmt.Errorf("files of guest memory: %w", err)
		}
		files = append(files, os.NewFile(uintptr(fd), "guest memory"))
	}
	return files, nil
}
