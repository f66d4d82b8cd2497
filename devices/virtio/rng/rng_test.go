package rng

import (
	"bytes"
	"encoding/binary"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// sequence is a source of 1, 2, 3 and so on, in pieces of at most seven bytes.
func sequence() Source {
	next := byte(0)
	return func(p []byte) (int, error) {
		n := min(len(p), 7)
		for i := range p[:n] {
			next++
			p[i] = next
		}
		return n, nil
	}
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New:     func(testing.TB) virtio.Device { return New(Config{}) },
		Drained: []int{0},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			if got := d.Queue(0).Do(nil, 16); len(got) != 16 {
				tb.Errorf("got %d bytes, want 16", len(got))
			}
		},
		Chain: func(d *virtiotest.Driver, _ int) []virtiotest.Segment {
			return []virtiotest.Segment{{GPA: d.Alloc(64, 16), Len: 64, Write: true}}
		},
	})
}

func TestRequests(t *testing.T) {
	d := virtiotest.NewDriver(t, New(Config{Source: sequence()}))
	d.Start(virtio.TransportFeatures, 8)
	if got, want := d.Queue(0).Do(nil, 5), []byte{1, 2, 3, 4, 5}; !bytes.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	if got, want := d.Queue(0).Do(nil, 8, 1, 3), []byte{6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}; !bytes.Equal(got, want) {
		t.Errorf("over three buffers: got %v, want %v", got, want)
	}
	if got := d.Queue(0).Do(nil, 3000, 100000); len(got) != maxRequest {
		t.Errorf("a long buffer got %d bytes, want %d", len(got), maxRequest)
	}
	if d.Status()&virtio.StatusNeedsReset != 0 {
		t.Error("the device wants a reset")
	}
}

func TestKernelSource(t *testing.T) {
	d := virtiotest.NewDriver(t, New(Config{}))
	d.Start(virtio.TransportFeatures, 8)
	first, second := d.Queue(0).Do(nil, 64), d.Queue(0).Do(nil, 64)
	if len(first) != 64 || len(second) != 64 || bytes.Equal(first, second) || bytes.Equal(first, make([]byte, 64)) {
		t.Errorf("not random: %x, %x", first, second)
	}
}

func TestMalformed(t *testing.T) {
	for name, out := range map[string][][]byte{"readable": {{1, 2, 3}}, "both": {{1}}} {
		t.Run(name, func(t *testing.T) {
			d := virtiotest.NewDriver(t, New(Config{Source: sequence()}))
			d.Start(virtio.TransportFeatures, 8)
			in := []int{}
			if name == "both" {
				in = append(in, 16)
			}
			if got := d.Queue(0).Do(out, in...); len(got) != 0 {
				t.Errorf("got %v", got)
			}
			if d.Status()&virtio.StatusNeedsReset == 0 {
				t.Error("the driver's fault was not reported")
			}
			d.Start(virtio.TransportFeatures, 8)
			if got := d.Queue(0).Do(nil, 4); len(got) != 4 {
				t.Errorf("after the reset: %v", got)
			}
		})
	}
}

// TestFlood: a driver that never runs dry does not keep the device from being
// paused or reset.
func TestFlood(t *testing.T) {
	const size = 8
	var avail atomic.Pointer[[]byte]
	var requests atomic.Uint32
	requests.Store(1)
	source := func(p []byte) (int, error) {
		// Every answer meets a new request: the same chain once more.
		binary.LittleEndian.PutUint16((*avail.Load())[2:], uint16(requests.Add(1)))
		return len(p), nil
	}
	d := virtiotest.NewDriver(t, New(Config{Source: source}))
	d.Start(0, size)
	q := d.Queue(0)
	_, at, _ := q.Rings()
	ring, err := d.Machine.Memory.Writable(at, 4+2*size)
	if err != nil {
		t.Fatal(err)
	}
	avail.Store(&ring)
	q.SetDescriptor(0, d.Alloc(16, 16), 16, 2, 0)
	q.Offer(0)
	q.Expose()
	q.ForceKick()
	d.Function.Pause()
	if err := d.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	d.Reset()
	if n := requests.Load(); n < virtio.Budget {
		t.Errorf("%d requests were answered, which is no flood", n)
	}
}

// chainOf makes a chain of the given lengths.
func chainOf(readable, writable []int) *virtio.Chain {
	c := &virtio.Chain{}
	for _, n := range readable {
		c.Readable = append(c.Readable, virtio.Buffer{Data: make([]byte, n)})
		c.ReadableBytes += uint64(n)
	}
	for _, n := range writable {
		c.Writable = append(c.Writable, virtio.Buffer{Data: make([]byte, n)})
		c.WritableBytes += uint64(n)
	}
	return c
}

func TestAllocations(t *testing.T) {
	c := chainOf(nil, []int{64, 64})
	if n := testing.AllocsPerRun(100, func() { _, _ = fill(c, getrandom) }); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// FuzzRequest: every byte up to the length is random, none after it is touched.
func FuzzRequest(f *testing.F) {
	f.Add(uint8(0), uint16(16), uint16(0))
	f.Add(uint8(4), uint16(16), uint16(0))
	f.Add(uint8(0), uint16(4095), uint16(4000))
	f.Add(uint8(0), uint16(0), uint16(0))
	f.Fuzz(func(t *testing.T, out uint8, first, second uint16) {
		c := chainOf([]int{int(out)}[:min(1, out)], []int{int(first), int(second)})
		n, err := fill(c, func(p []byte) (int, error) {
			half := (len(p) + 1) / 2
			for i := range p[:half] {
				p[i] = 0xFF
			}
			return half, nil
		})
		want := min(c.WritableBytes, maxRequest)
		if out > 0 {
			want = 0
		}
		if (err != nil) != (want == 0) || uint64(n) != want {
			t.Fatalf("%d bytes, %v, want %d", n, err, want)
		}
		got := bytes.Count(append(c.Writable[0].Data, c.Writable[1].Data...), []byte{0xFF})
		if got != int(want) {
			t.Fatalf("%d bytes were written, want %d", got, want)
		}
	})
}

func FuzzDevice(f *testing.F) {
	virtiotest.Fuzz(f, func(testing.TB) virtio.Device { return New(Config{}) })
}
