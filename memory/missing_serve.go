package memory

import (
	"encoding/binary"
	"errors"

	"golang.org/x/sys/unix"
)

// From include/uapi/linux/userfaultfd.h: struct uffd_msg.
const (
	uffdMessageSize    = 32
	uffdEventPagefault = 0x12
	offMessageEvent    = 0  // u8
	offMessageAddress  = 16 // u64, of a page fault
)

// serveMessages is how many faults are read at once.
const serveMessages = 16

// serve answers the faults of the kernel until Close. It waits in poll itself
// and not in the runtime's poller, which can be milliseconds late while vCPUs
// keep the processors.
func (m *Missing) serve() {
	var buf [serveMessages * uffdMessageSize]byte
	fds := []unix.PollFd{{Fd: int32(m.fault.fd), Events: unix.POLLIN}, {Fd: int32(m.stop), Events: unix.POLLIN}}
	for {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return
		}
		if fds[1].Revents != 0 {
			return
		}
		n, err := unix.Read(m.fault.fd, buf[:])
		if err != nil {
			continue // nothing there any more
		}
		for b := buf[:n]; len(b) >= uffdMessageSize; b = b[uffdMessageSize:] {
			if b[offMessageEvent] == uffdEventPagefault {
				m.resolve(uintptr(binary.NativeEndian.Uint64(b[offMessageAddress:])))
			}
		}
	}
}

// resolve brings the page at hva, for which somebody waits, and its neighbours
// that are read together with it.
func (m *Missing) resolve(hva uintptr) {
	m.faults.Add(1)
	hva &^= PageSize - 1
	gpa, ok := m.gpa(hva)
	if !ok {
		_ = m.fault.wake(hva, PageSize)
		return
	}
	m.note(Range{Start: gpa, Size: PageSize})
	// A page that was given back while it was read does not wait any more, and
	// is still a hole.
	for m.holes.Has(gpa) {
		var err error
		if run := m.around(gpa); m.waiting.Has(gpa) {
			err = m.fill(run)
			if !m.holes.Has(gpa) {
				err = nil // only a neighbour cannot be had
			}
		} else {
			err = m.zero(Range{Start: gpa, Size: PageSize})
		}
		if err != nil {
			_ = m.fail(Range{Start: gpa, Size: PageSize}, err)
			return
		}
	}
	// It may have come before the fault was read.
	_ = m.fault.wake(hva, PageSize)
}

// gpa returns the guest's address of a host's.
func (m *Missing) gpa(hva uintptr) (GPA, bool) {
	for i := range m.space.regions {
		r := &m.space.regions[i]
		if off := hva - uintptr(r.HVA); hva >= uintptr(r.HVA) && uint64(off) < r.Size {
			return r.Start + GPA(off), true
		}
	}
	return 0, false
}

// aroundPages bounds what is read at a fault beyond the page that it is about:
// 128 KiB.
const aroundPages = 32

// around returns the pages that wait around gpa, as far as they are read together
// with it.
func (m *Missing) around(gpa GPA) Range {
	const window = aroundPages * PageSize
	page := Range{Start: gpa, Size: PageSize}
	row, ok := intersect(m.source.Row(gpa.GFN()), Range{Start: gpa &^ (window - 1), Size: window})
	if !ok || !row.Contains(gpa, PageSize) {
		return page
	}
	row, _ = intersect(row, m.frame(gpa&^(LargeFrameSize-1)))
	_ = m.waiting.spans(row, func(run Range, in bool) error {
		if in && run.Contains(gpa, PageSize) {
			page = run
		}
		return nil
	})
	return page
}
