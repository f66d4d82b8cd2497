package wire

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	c := NewConn(&buf)
	frames := []Frame{
		{Stdin, 1, []byte("abc")},
		{StdinEOF, 0xffffffff, []byte{}},
		{Stdout, 7, bytes.Repeat([]byte{0xff}, MaxData)},
	}
	for _, f := range frames {
		if err := c.Write(f.Type, f.Run, f.Payload); err != nil {
			t.Fatal(err)
		}
	}
	for _, want := range frames {
		got, err := c.Read()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("frame (-want +got):\n%s", diff)
		}
	}
	if _, err := c.Read(); !errors.Is(err, io.EOF) {
		t.Errorf("at the end: %v, want EOF", err)
	}
}

// header returns the bytes before a payload.
func header(n uint32, t Type) []byte {
	return append(binary.LittleEndian.AppendUint32(nil, n), byte(t), 0, 0, 0, 0)
}

func TestBadFrames(t *testing.T) {
	for name, b := range map[string][]byte{
		"type zero":    header(0, 0),
		"unknown type": header(0, typeEnd),
		"too long":     header(MaxPayload+1, Stdin),
		"cut header":   header(0, Stdin)[:5],
		"cut payload":  append(header(10, Stdin), "short"...),
	} {
		if f, err := NewConn(bytes.NewBuffer(b)).Read(); err == nil || errors.Is(err, io.EOF) {
			t.Errorf("%s: %+v, %v", name, f, err)
		}
	}
	if err := NewConn(&bytes.Buffer{}).Write(Stdin, 1, make([]byte, MaxPayload+1)); err == nil {
		t.Error("a frame was written that no reader takes")
	}
}

func TestConcurrentWritesStayWhole(t *testing.T) {
	a, b := net.Pipe()
	defer func() { _ = a.Close() }()
	defer func() { _ = b.Close() }()
	c := NewConn(a)
	const writers, each = 4, 50
	for w := range writers {
		go func() {
			for range each {
				if c.Write(Stdout, uint32(w), bytes.Repeat([]byte{byte(w)}, 100)) != nil {
					return
				}
			}
		}()
	}
	r := NewConn(b)
	for range writers * each {
		f, err := r.Read()
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(f.Payload, bytes.Repeat([]byte{byte(f.Run)}, 100)) {
			t.Fatal("frames of two writers are mixed")
		}
	}
}

func FuzzRead(f *testing.F) {
	f.Add(append(header(3, Stdin), "abc"...))
	f.Add(header(MaxPayload+1, Exit))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		var out bytes.Buffer
		r, w := NewConn(bytes.NewBuffer(b)), NewConn(&out)
		for {
			fr, err := r.Read()
			if err != nil {
				break
			}
			if err := w.Write(fr.Type, fr.Run, fr.Payload); err != nil {
				t.Fatal(err)
			}
		}
		if !bytes.HasPrefix(b, out.Bytes()) {
			t.Error("what was read is written differently")
		}
	})
}
