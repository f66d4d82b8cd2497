package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// The stream's framing: a big-endian length, then the frame (QEMU's
// -netdev stream, passt).
const lengthSize = 4

// streamBuffer is the size in bytes of each direction's buffer: some of the
// longest frames, or a hundred usual ones a system call.
const streamBuffer = 256 << 10

// Stream is a [Backend] over a connected stream socket. It has no offloads.
type Stream struct {
	fd  int
	in  []byte // [inStart:inEnd] was read and not yet received
	out []byte // [outStart:outEnd] was taken by Send and not yet written

	inStart, inEnd   int
	outStart, outEnd int
}

// NewStream makes a backend from a connected stream socket, which it sets not
// to block. The descriptor stays the caller's.
func NewStream(fd int) (*Stream, error) {
	if err := unix.SetNonblock(fd, true); err != nil {
		return nil, fmt.Errorf("network socket: %w", err)
	}
	// Frames are gathered here already; only TCP sockets know the option.
	_ = unix.SetsockoptInt(fd, unix.IPPROTO_TCP, unix.TCP_NODELAY, 1)
	return &Stream{fd: fd, in: make([]byte, streamBuffer), out: make([]byte, streamBuffer)}, nil
}

// FD implements [Backend].
func (s *Stream) FD() int { return s.fd }

// Offloads implements [Backend]: the peer wants finished frames.
func (s *Stream) Offloads() uint64 { return 0 }

// SetOffloads implements [Backend].
func (s *Stream) SetOffloads(uint64) error { return nil }

// Receive implements [Backend]. io.EOF means that the peer has closed.
func (s *Stream) Receive(to [][]byte) (int, error) {
	for {
		frame, err := s.next()
		if err != nil {
			return 0, err
		}
		if n := scatter(to, frame); n > 0 {
			return n, nil
		}
		// It does not fit or is no frame at all: look at the next.
	}
}

// next takes a frame out of the buffer, reading more when it must.
func (s *Stream) next() ([]byte, error) {
	for {
		if s.inEnd-s.inStart >= lengthSize {
			n := binary.BigEndian.Uint32(s.in[s.inStart:])
			if n > MaxFrame {
				return nil, fmt.Errorf("network socket: the peer sent a frame of %d bytes, more than %d", n, MaxFrame)
			}
			if end := s.inStart + lengthSize + int(n); end <= s.inEnd {
				frame := s.in[s.inStart+lengthSize : end]
				s.inStart = end
				return frame, nil
			}
		}
		if err := s.read(); err != nil {
			return nil, err
		}
	}
}

// read fetches what the socket has.
func (s *Stream) read() error {
	// A frame that is cut by the buffer's end moves to its start.
	s.inEnd = copy(s.in, s.in[s.inStart:s.inEnd])
	s.inStart = 0
	for {
		n, err := unix.Read(s.fd, s.in[s.inEnd:])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return unix.EAGAIN
		case err != nil:
			return fmt.Errorf("network socket: %w", err)
		case n == 0:
			return io.EOF
		}
		s.inEnd += n
		return nil
	}
}

// scatter writes an empty header and the frame to the buffers and returns the
// length of both, or 0 when they do not fit or the frame is too short.
func scatter(to [][]byte, frame []byte) int {
	total := HeaderSize + len(frame)
	if len(frame) < ethernetSize || !fits(to, total) {
		return 0
	}
	var header [HeaderSize]byte
	rest := header[:]
	last := false
	for _, b := range to {
		for len(b) > 0 {
			if len(rest) == 0 {
				if last {
					return total
				}
				rest, last = frame, true
			}
			n := copy(b, rest)
			b, rest = b[n:], rest[n:]
		}
	}
	return total
}

// fits reports whether the buffers hold n bytes.
func fits(to [][]byte, n int) bool {
	for _, b := range to {
		if n -= len(b); n <= 0 {
			return true
		}
	}
	return false
}

// Send implements [Backend]. The frame is copied, so that many go with one
// system call.
func (s *Stream) Send(from [][]byte) error {
	n := 0
	for _, b := range from[1:] {
		n += len(b)
	}
	if lengthSize+n > len(s.out)-s.outEnd {
		if err := s.Flush(); err != nil {
			return err
		}
	}
	binary.BigEndian.PutUint32(s.out[s.outEnd:], uint32(n))
	s.outEnd += lengthSize
	for _, b := range from[1:] {
		s.outEnd += copy(s.out[s.outEnd:], b)
	}
	return nil
}

// Flush implements [Backend].
func (s *Stream) Flush() error {
	for s.outStart < s.outEnd {
		n, err := unix.Write(s.fd, s.out[s.outStart:s.outEnd])
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EAGAIN):
			return unix.EAGAIN
		case err != nil:
			return fmt.Errorf("network socket: %w", err)
		}
		s.outStart += n
	}
	s.outStart, s.outEnd = 0, 0
	return nil
}
