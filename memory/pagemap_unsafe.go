package memory

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// pagemap is an open /proc/self/pagemap with the PAGEMAP_SCAN ioctl (Linux 6.7,
// Documentation/admin-guide/mm/pagemap.rst). It is not safe for concurrent use:
// the answer is built in one buffer.
type pagemap struct {
	fd  int
	buf []pageRegion
}

// Categories of a page (include/uapi/linux/fs.h).
const (
	pageIsWritten = 1 << 1
	pageIsFile    = 1 << 2
	pageIsPresent = 1 << 3
	pageIsSwapped = 1 << 4
	pageIsPFNZero = 1 << 5
	pageIsHuge    = 1 << 6
)

// Flags of a scan.
const (
	scanWPMatching   = 1 << 0
	scanCheckWPAsync = 1 << 1
)

const pagemapScan = 0xc0606610 // _IOWR('f', 16, struct pm_scan_arg)

// scanRegions is how many runs one call may return: 96 KiB of buffer.
const scanRegions = 4096

// pageRegion mirrors struct page_region.
type pageRegion struct{ Start, End, Categories uint64 }

// scanArg mirrors struct pm_scan_arg.
type scanArg struct {
	Size, Flags, Start, End, WalkEnd uint64
	Vec, VecLen, MaxPages            uint64
	Inverted, Mask, AnyOf, Return    uint64
}

// scanQuery says which pages a scan is about: those that have all categories of
// mask (or lack them, where inverted) and at least one of anyOf. Pages are told
// apart by the categories of ret.
type scanQuery struct {
	flags                      uint64
	mask, inverted, anyOf, ret uint64
}

func openPagemap() (*pagemap, error) {
	fd, err := unix.Open("/proc/self/pagemap", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /proc/self/pagemap: %w", err)
	}
	return &pagemap{fd: fd, buf: make([]pageRegion, scanRegions)}, nil
}

func (p *pagemap) close() error { return unix.Close(p.fd) }

// scan calls visit for each run of matching pages of [start, end). After an
// error pages may have been armed that visit was not told of.
func (p *pagemap) scan(start, end uintptr, q scanQuery, visit func(start, end uintptr, categories uint64)) error {
	arg := scanArg{
		Flags: q.flags, Start: uint64(start), End: uint64(end),
		Mask: q.mask, Inverted: q.inverted, AnyOf: q.anyOf, Return: q.ret,
	}
	arg.Size = uint64(unsafe.Sizeof(arg))
	for arg.Start < arg.End {
		arg.WalkEnd = 0
		// SAFETY: buf is on the heap, does not move, and is kept alive below.
		arg.Vec, arg.VecLen = uint64(uintptr(unsafe.Pointer(&p.buf[0]))), uint64(len(p.buf))
		// SAFETY: the conversion of &arg stands in the call.
		n, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), pagemapScan, uintptr(unsafe.Pointer(&arg)))
		runtime.KeepAlive(p)
		switch {
		case errno == unix.EPERM && q.flags&scanCheckWPAsync != 0:
			return fmt.Errorf("PAGEMAP_SCAN: %w", ErrNotRegistered)
		case errno != 0:
			return fmt.Errorf("PAGEMAP_SCAN: %w", errno)
		case int(n) > len(p.buf):
			return fmt.Errorf("PAGEMAP_SCAN returned %d runs of %d: %w", n, len(p.buf), unix.EPROTO)
		}
		for _, r := range p.buf[:n] {
			visit(uintptr(r.Start), uintptr(r.End), r.Categories)
		}
		if int(n) < len(p.buf) {
			return nil
		}
		// walk_end is only a lower bound: the kernel walks in steps of 512 runs
		// and does not move it in the last (seen in 6.18).
		next := max(arg.WalkEnd, p.buf[n-1].End)
		if next <= arg.Start {
			return fmt.Errorf("PAGEMAP_SCAN made no progress: %w", unix.EPROTO)
		}
		arg.Start = next
	}
	return nil
}

// supported reports whether the kernel knows the ioctl.
func (p *pagemap) supported() error {
	arg := scanArg{}
	arg.Size = uint64(unsafe.Sizeof(arg))
	// SAFETY: the conversion stands in the call; an empty range is scanned.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(p.fd), pagemapScan, uintptr(unsafe.Pointer(&arg)))
	if errors.Is(errno, unix.ENOTTY) {
		return errno
	}
	return nil
}

// isHuge reports whether a huge page maps the large frame at hva.
func (p *pagemap) isHuge(hva uintptr) (bool, error) {
	huge := false
	q := scanQuery{mask: pageIsHuge | pageIsPresent, ret: pageIsHuge}
	err := p.scan(hva, hva+LargeFrameSize, q, func(start, end uintptr, _ uint64) {
		huge = end-start == LargeFrameSize
	})
	return huge, err
}
