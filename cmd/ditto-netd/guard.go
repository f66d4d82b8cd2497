package main

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"log/slog"
	"net"
)

// Bounds on what the VM may send.
const (
	frameHeader = 4  // big-endian length before each frame, bytes
	minFrame    = 14 // an Ethernet header, bytes
	// maxFrame is the largest IP packet and an Ethernet header with a VLAN
	// tag, bytes. A VMM that sends more is out of step or hostile.
	maxFrame = 65535 + 18
	// maxSources bounds the forwarding table of the switch, which never
	// forgets an address.
	maxSources = 64
)

// guard stands between the VM's socket and the switch, which trusts its peer:
// it would allocate any length it is told, index into frames without a header,
// and remember every source address. The guard refuses the first, drops the
// second, and drops frames from the 65th address on.
//
// Only Read is guarded, and only one goroutine reads.
type guard struct {
	net.Conn
	in      *bufio.Reader
	log     *slog.Logger
	sources map[[6]byte]struct{}
	left    int // bytes of the current frame, header included, not yet read
	warned  bool
}

func newGuard(conn net.Conn, log *slog.Logger) *guard {
	return &guard{
		Conn:    conn,
		in:      bufio.NewReaderSize(conn, 256<<10),
		log:     log,
		sources: make(map[[6]byte]struct{}),
	}
}

// Read implements io.Reader over the frames that pass.
func (g *guard) Read(p []byte) (int, error) {
	for g.left == 0 {
		if err := g.nextFrame(); err != nil {
			return 0, err
		}
	}
	n, err := g.in.Read(p[:min(len(p), g.left)])
	g.left -= n
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}

// nextFrame looks at the next frame and sets left when it passes.
func (g *guard) nextFrame() error {
	header, err := g.in.Peek(frameHeader)
	if err != nil {
		if len(header) > 0 {
			return io.ErrUnexpectedEOF
		}
		return err
	}
	n := int(binary.BigEndian.Uint32(header))
	if n > maxFrame {
		return fmt.Errorf("the VM sent a frame of %d bytes, more than %d", n, maxFrame)
	}
	if n < minFrame {
		return g.drop(n)
	}
	start, err := g.in.Peek(frameHeader + minFrame)
	if err != nil {
		return io.ErrUnexpectedEOF
	}
	source := [6]byte(start[frameHeader+6:])
	if _, known := g.sources[source]; !known {
		if len(g.sources) >= maxSources {
			if !g.warned {
				g.warned = true
				g.log.Warn("the guest uses too many Ethernet addresses; frames of further ones are dropped", "max", maxSources)
			}
			return g.drop(n)
		}
		g.sources[source] = struct{}{}
	}
	g.left = frameHeader + n
	return nil
}

// drop skips a frame of n bytes.
func (g *guard) drop(n int) error {
	_, err := g.in.Discard(frameHeader + n)
	return err
}
