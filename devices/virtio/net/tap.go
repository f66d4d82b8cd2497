package net

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrDropped is returned by a backend that could not send one frame.
var ErrDropped = errors.New("frame dropped")

// The offloads of a tap (TUNSETOFFLOAD, linux/if_tun.h).
const (
	tunCsum   = 0x01
	tunTSO4   = 0x02
	tunTSO6   = 0x04
	tunTSOECN = 0x08
	tunUSO4   = 0x20
	tunUSO6   = 0x40
)

const (
	tunTCP = tunCsum | tunTSO4 | tunTSO6 | tunTSOECN
	tunUSO = tunUSO4 | tunUSO6 // Linux 6.2
)

// Tap is a [Backend] over a tap descriptor.
type Tap struct {
	fd       int
	offloads uint64

	receive, send vector
}

// NewTap makes a backend from a descriptor of /dev/net/tun that does not
// block, is attached to an interface with IFF_VNET_HDR and has a header size
// of [HeaderSize]. The descriptor stays the caller's.
func NewTap(fd int) (*Tap, error) {
	t := &Tap{fd: fd}
	switch {
	case setOffload(fd, tunTCP|tunUSO) == nil:
		t.offloads = offloads
	case setOffload(fd, tunTCP) == nil:
		t.offloads = offloads &^ (featureHostUSO | featureGuestUSO4 | featureGuestUSO6)
	}
	if err := setOffload(fd, 0); err != nil {
		return nil, fmt.Errorf("tap: switch the offloads off: %w", err)
	}
	return t, nil
}

// FD implements [Backend].
func (t *Tap) FD() int { return t.fd }

// Offloads implements [Backend].
func (t *Tap) Offloads() uint64 { return t.offloads }

// SetOffloads implements [Backend].
func (t *Tap) SetOffloads(features uint64) error {
	flags := 0
	for _, o := range [...]struct {
		feature uint64
		flag    int
	}{
		{featureGuestCsum, tunCsum}, {featureGuestTSO4, tunTSO4}, {featureGuestTSO6, tunTSO6},
		{featureGuestECN, tunTSOECN}, {featureGuestUSO4, tunUSO4}, {featureGuestUSO6, tunUSO6},
	} {
		if features&o.feature != 0 {
			flags |= o.flag
		}
	}
	if flags&tunCsum == 0 {
		flags = 0 // the kernel refuses segments without checksums
	}
	if flags&tunUSO != tunUSO {
		flags &^= tunUSO // and one UDP without the other
	}
	if err := setOffload(t.fd, flags); err != nil {
		return fmt.Errorf("tap: set offloads %#x: %w", flags, err)
	}
	return nil
}

// Receive implements [Backend].
func (t *Tap) Receive(to [][]byte) (int, error) {
	for {
		n, err := t.receive.readv(t.fd, to)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return n, err
	}
}

// Send implements [Backend].
func (t *Tap) Send(from [][]byte) error {
	for {
		_, err := t.send.writev(t.fd, from)
		switch {
		case err == nil, errors.Is(err, unix.EAGAIN):
			return err
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EBADF), errors.Is(err, unix.EBADFD):
			return fmt.Errorf("tap: the interface is gone: %w", err)
		}
		// The interface is down, the kernel is short of memory or does not
		// like the frame.
		return ErrDropped
	}
}

// Flush implements [Backend].
func (t *Tap) Flush() error { return nil }

func setOffload(fd, flags int) error {
	return unix.IoctlSetInt(fd, unix.TUNSETOFFLOAD, flags)
}
