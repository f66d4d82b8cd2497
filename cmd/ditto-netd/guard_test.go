package main

import (
	"bytes"
	"encoding/binary"
	"io"
	"log/slog"
	"net"
	"testing"
	"testing/iotest"
)

// bytesConn is a connection to read fixed bytes from.
type bytesConn struct {
	net.Conn
	io.Reader
}

func (c bytesConn) Read(p []byte) (int, error) { return c.Reader.Read(p) }

func frameFrom(source byte, n int) []byte {
	frame := make([]byte, n)
	for i := range frame {
		frame[i] = byte(i)
	}
	if n >= minFrame {
		copy(frame[6:12], []byte{2, 0, 0, 0, 0, source})
	}
	return framed(frame)
}

func TestGuard(t *testing.T) {
	var many, passed []byte
	for i := range maxSources + 3 {
		many = append(many, frameFrom(byte(i), 60)...)
		if i < maxSources {
			passed = append(passed, frameFrom(byte(i), 60)...)
		}
	}
	many = append(many, frameFrom(0, 60)...)
	passed = append(passed, frameFrom(0, 60)...)
	for _, test := range []struct {
		name     string
		in, want []byte
		ok       bool
	}{
		{"nothing", nil, nil, true},
		{"frames", append(frameFrom(1, 60), frameFrom(1, maxFrame)...), append(frameFrom(1, 60), frameFrom(1, maxFrame)...), true},
		{"runts are dropped", append(append(frameFrom(1, 0), frameFrom(1, 13)...), frameFrom(1, 14)...), frameFrom(1, 14), true},
		{"too many sources", many, passed, true},
		{"too long", append(frameFrom(1, 60), frameFrom(1, maxFrame+1)...), frameFrom(1, 60), false},
		{"cut in the length", frameFrom(1, 60)[:2], nil, false},
		{"cut in the header", frameFrom(1, 60)[:10], nil, false},
		{"cut in the frame", frameFrom(1, 60)[:30], frameFrom(1, 60)[:30], false},
	} {
		t.Run(test.name, func(t *testing.T) {
			g := newGuard(bytesConn{Reader: iotest.HalfReader(bytes.NewReader(test.in))}, slog.New(slog.DiscardHandler))
			got, err := io.ReadAll(g)
			if (err == nil) != test.ok {
				t.Errorf("error %v, want ok %t", err, test.ok)
			}
			if !bytes.Equal(got, test.want) {
				t.Errorf("%d bytes passed, want %d", len(got), len(test.want))
			}
		})
	}
}

// FuzzGuard: whatever comes in, what passes is whole frames of valid length.
func FuzzGuard(f *testing.F) {
	f.Add(frameFrom(1, 60))
	f.Add(append(frameFrom(1, 3), frameFrom(2, 14)...))
	f.Add([]byte{0xff, 0xff, 0xff, 0xff, 0})
	f.Fuzz(func(t *testing.T, in []byte) {
		got, err := io.ReadAll(newGuard(bytesConn{Reader: bytes.NewReader(in)}, slog.New(slog.DiscardHandler)))
		for len(got) >= frameHeader {
			n := int(binary.BigEndian.Uint32(got))
			if n < minFrame || n > maxFrame {
				t.Fatalf("a frame of %d bytes passed", n)
			}
			if len(got) < frameHeader+n {
				if err == nil {
					t.Fatal("a cut frame passed without an error")
				}
				return
			}
			got = got[frameHeader+n:]
		}
	})
}
