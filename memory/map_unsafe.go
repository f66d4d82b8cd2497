package memory

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"
)

// mapping is one host mapping with the reserved address space around it that
// made its alignment possible.
type mapping struct {
	reserved unsafe.Pointer // start of the reservation
	length   uintptr        // of the reservation, bytes
	start    unsafe.Pointer // of the guest memory inside it
	size     uintptr        // of the guest memory, bytes
	fd       int            // memfd, or -1
}

// mapRegion maps r so that the host address is congruent with r.Start modulo
// the frame size. Address space is reserved first, one frame longer than
// needed, and the memory is then mapped over the aligned part.
func mapRegion(r Range, config Config) (mapping, error) {
	m, err := reserve(r, config)
	if err != nil {
		return mapping{}, err
	}
	if err := m.populate(config); err != nil {
		return mapping{}, errors.Join(err, m.close())
	}
	return m, nil
}

// reserve reserves address space for r.
func reserve(r Range, config Config) (mapping, error) {
	frame := uintptr(config.HugePages.frameSize())
	m := mapping{size: uintptr(r.Size), length: uintptr(r.Size) + frame, fd: -1}

	p, err := unix.MmapPtr(-1, 0, nil, m.length, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return mapping{}, fmt.Errorf("reserve address space: %w", err)
	}
	m.reserved = p
	want := uintptr(r.Start) % frame
	// SAFETY: less than one frame is added, by which the reservation is longer.
	m.start = unsafe.Add(p, (want+frame-uintptr(p)%frame)%frame)
	return m, nil
}

// populate maps the memory that config asks for over the reservation.
func (m *mapping) populate(config Config) error {
	flags := unix.MAP_FIXED | unix.MAP_NORESERVE
	switch config.Backing {
	case Anonymous:
		flags |= unix.MAP_PRIVATE | unix.MAP_ANONYMOUS
	case Memfd:
		flags |= unix.MAP_SHARED
	default:
		return fmt.Errorf("backing %s: %w", config.Backing, unix.EINVAL)
	}

	memfdFlags := unix.MFD_CLOEXEC | unix.MFD_ALLOW_SEALING
	switch config.HugePages {
	case HugePages2M, HugePages1G:
		// Reserve from the pool now: a fault without a page would be SIGBUS.
		flags &^= unix.MAP_NORESERVE
		size := unix.MAP_HUGE_2MB
		if config.HugePages == HugePages1G {
			size = unix.MAP_HUGE_1GB
		}
		if config.Backing == Memfd {
			memfdFlags |= unix.MFD_HUGETLB | size
		} else {
			flags |= unix.MAP_HUGETLB | size
		}
	}

	if config.Backing == Memfd {
		fd, err := unix.MemfdCreate("ditto-ram", memfdFlags)
		if err != nil {
			return fmt.Errorf("memfd_create: %w", hugePagesHint(err, config))
		}
		m.fd = fd
		if err := unix.Ftruncate(fd, int64(m.size)); err != nil {
			return fmt.Errorf("size the memfd: %w", hugePagesHint(err, config))
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, sealed|unix.F_SEAL_SEAL); err != nil {
			return fmt.Errorf("seal the memfd: %w", err)
		}
	}
	// SAFETY: the address range was reserved above and belongs to m alone.
	if _, err := unix.MmapPtr(m.fd, 0, m.start, m.size, unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return fmt.Errorf("mmap: %w", hugePagesHint(err, config))
	}
	adviseHugePages(m.bytes(), config)
	advisePrivate(m.bytes())
	return nil
}

// adviseHugePages tells the kernel which pages anonymous memory is to have.
func adviseHugePages(mem []byte, config Config) {
	switch config.HugePages {
	case HugePagesTHP:
		// A kernel without THP answers EINVAL; small pages then do.
		_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	case HugePagesOff:
		_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
	}
}

// advisePrivate keeps guest RAM out of core files, where it has no place, and out
// of children, which have no use for it.
func advisePrivate(mem []byte) {
	_ = unix.Madvise(mem, unix.MADV_DONTDUMP)
	_ = unix.Madvise(mem, unix.MADV_DONTFORK)
}

// mapOver maps a file privately over guest memory, or with fd -1 anonymous
// memory. What was there is gone; the address stays.
func mapOver(mem []byte, fd int, offset int64) error {
	flags := unix.MAP_FIXED | unix.MAP_PRIVATE | unix.MAP_NORESERVE
	if fd < 0 {
		flags |= unix.MAP_ANONYMOUS
	}
	// SAFETY: mem is a part of a mapping that its Space owns, which replaces it;
	// nobody relies on the bytes that were there.
	if _, err := unix.MmapPtr(fd, offset, unsafe.Pointer(&mem[0]), uintptr(len(mem)), unix.PROT_READ|unix.PROT_WRITE, flags); err != nil {
		return fmt.Errorf("mmap: %w", err)
	}
	return nil
}

// hugePagesHint says what to do when there is no hugetlbfs pool, or it was too
// small.
func hugePagesHint(err error, config Config) error {
	var kb int
	switch config.HugePages {
	case HugePages2M:
		kb = 2048
	case HugePages1G:
		kb = 1048576
	default:
		return err
	}
	switch {
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("the CPU or the kernel has no %s huge pages: use --hugepages thp: %w", config.HugePages, err)
	case !errors.Is(err, unix.ENOMEM):
		return err
	}
	return fmt.Errorf("not enough free %s huge pages: raise /sys/kernel/mm/hugepages/hugepages-%dkB/nr_hugepages, or use --hugepages thp: %w", config.HugePages, kb, err)
}

// bytes returns the guest memory as a slice.
func (m *mapping) bytes() []byte {
	// SAFETY: [start, start+size) is mapped until close, outside the Go heap.
	return unsafe.Slice((*byte)(m.start), m.size)
}

func (m *mapping) hva() HVA { return HVA(uintptr(m.start)) }

// close gives back the memory, the reservation and the memfd.
func (m *mapping) close() error {
	var errs []error
	if m.reserved != nil {
		// SAFETY: the reservation belongs to m, and the owner of the Space
		// has joined everyone who held a slice of it.
		errs = append(errs, unix.MunmapPtr(m.reserved, m.length))
	}
	if m.fd >= 0 {
		errs = append(errs, unix.Close(m.fd))
	}
	return errors.Join(errs...)
}
