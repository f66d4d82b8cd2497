package net

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

// chainOf makes a chain of readable buffers of a page each.
func chainOf(p []byte) *virtio.Chain {
	c := &virtio.Chain{ReadableBytes: uint64(len(p))}
	for len(p) > 0 {
		n := min(4096, len(p))
		c.Readable = append(c.Readable, virtio.Buffer{Data: p[:n]})
		p = p[n:]
	}
	return c
}

// TestAllocations: the way of a frame allocates nothing.
func TestAllocations(t *testing.T) {
	s, p := newStream(t)
	dev := newDevice(t, Config{Backend: s})
	tx := transmitter{run: &run{device: dev, backend: s}}
	sent := chainOf(headed(Header{}, frame(guestMAC, otherMAC, 9000)))
	to := [][]byte{make([]byte, 100), make([]byte, 10000)}
	raw := make([]byte, 9004)
	if n := testing.AllocsPerRun(100, func() {
		if err := errors.Join(tx.send(sent), tx.flush()); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(p, raw); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.Write(p.fd, raw); err != nil {
			t.Fatal(err)
		}
		if n, err := s.Receive(to); n != HeaderSize+9000 || err != nil {
			t.Fatal(n, err)
		}
		var start [filterBytes]byte
		dev.filter.pass(&start, guestMAC)
	}); n != 0 {
		t.Errorf("%v allocations a frame", n)
	}
}

// FuzzStream: whatever a peer sends, in whatever pieces, whole frames of valid
// length come out in order, and nothing else.
func FuzzStream(f *testing.F) {
	framed := func(n int) []byte {
		return append(binary.BigEndian.AppendUint32(nil, uint32(n)), frame(otherMAC, guestMAC, max(n, ethernetSize))[:n]...)
	}
	f.Add(append(framed(60), framed(14)...), uint16(3))
	f.Add(append(framed(3), framed(1514)...), uint16(1000))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0}, uint16(1))
	f.Fuzz(func(t *testing.T, in []byte, piece uint16) {
		if len(in) > 64<<10 {
			return
		}
		s, p := newStream(t)
		to := [][]byte{make([]byte, 7), make([]byte, HeaderSize+MaxFrame)}
		expect := in
		for len(in) > 0 {
			n := min(int(piece)+1, len(in))
			if _, err := unix.Write(p.fd, in[:n]); err != nil {
				t.Fatal(err)
			}
			in = in[n:]
			for {
				n, err := s.Receive(to)
				if again(err) {
					break
				}
				if err != nil {
					return
				}
				want := nextFrame(t, &expect)
				got := append(append([]byte{}, to[0]...), to[1]...)[:n]
				if !bytes.Equal(got[:HeaderSize], make([]byte, HeaderSize)) || !bytes.Equal(got[HeaderSize:], want) {
					t.Fatalf("got a frame of %d bytes, want %d", n-HeaderSize, len(want))
				}
			}
		}
	})
}

// nextFrame takes the next frame that is long enough off a stream.
func nextFrame(t *testing.T, stream *[]byte) []byte {
	t.Helper()
	for {
		p := *stream
		if len(p) < 4 || len(p)-4 < int(binary.BigEndian.Uint32(p)) {
			t.Fatal("a frame came from nowhere")
		}
		n := int(binary.BigEndian.Uint32(p))
		*stream = p[4+n:]
		if n >= ethernetSize {
			return p[4 : 4+n]
		}
	}
}

// TestStreamInPieces receives frames that arrive byte by byte.
func TestStreamInPieces(t *testing.T) {
	s, p := newStream(t)
	to := [][]byte{make([]byte, 5), make([]byte, 2000)}
	want := frame(otherMAC, guestMAC, 300)
	for i, b := range append([]byte{0, 0, 1, 44}, want...) {
		if n, err := s.Receive(to); !again(err) {
			t.Fatalf("after %d bytes: %d, %v", i, n, err)
		}
		if _, err := unix.Write(p.fd, []byte{b}); err != nil {
			t.Fatal(err)
		}
	}
	if n, err := s.Receive(to); n != HeaderSize+300 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	p.close()
	if _, err := s.Receive(to); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

func FuzzDevice(f *testing.F) {
	virtiotest.Fuzz(f, func(tb testing.TB) virtio.Device {
		s, p := newStream(tb)
		for n := range 10 {
			p.send(frame(otherMAC, guestMAC, 14+n*100))
		}
		return newDevice(tb, Config{Backend: s})
	})
}
