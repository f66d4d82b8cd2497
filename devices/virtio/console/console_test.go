package console

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"strings"
	"sync"
	"testing"

	"go.uber.org/goleak"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// recorder is an Output that can be held up.
type recorder struct {
	mu   sync.Mutex // held: Write blocks
	text bytes.Buffer
}

func (r *recorder) Write(p []byte) (int, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.Write(p)
}

func (r *recorder) String() string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.text.String()
}

func newDevice(tb testing.TB, output *recorder) *Device {
	tb.Helper()
	d, err := New(Config{Output: output, Cols: 80, Rows: 25})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

func started(tb testing.TB) (*Device, *virtiotest.Driver, *recorder) {
	tb.Helper()
	output := &recorder{}
	dev := newDevice(tb, output)
	d := virtiotest.NewDriver(tb, dev)
	d.Start(^uint64(0), 16)
	return dev, d, output
}

func flush(tb testing.TB, dev *Device) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), virtiotest.Patience)
	defer cancel()
	if err := dev.Flush(ctx); err != nil {
		tb.Fatal(err)
	}
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New:     func(tb testing.TB) virtio.Device { return newDevice(tb, &recorder{}) },
		Drained: []int{transmitQueue},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			d.Queue(transmitQueue).Do([][]byte{[]byte("hello")})
		},
		Chain: func(d *virtiotest.Driver, queue int) []virtiotest.Segment {
			return []virtiotest.Segment{{GPA: d.Alloc(64, 16), Len: 64, Write: queue == receiveQueue}}
		},
	})
}

func TestOutput(t *testing.T) {
	dev, d, output := started(t)
	var want strings.Builder
	for range 200 {
		d.Queue(transmitQueue).Do([][]byte{[]byte("one "), []byte("two "), []byte("three\n")})
		want.WriteString("one two three\n")
	}
	flush(t, dev)
	if got := output.String(); got != want.String() {
		t.Errorf("%d bytes of output, want %d", len(got), want.Len())
	}
}

// TestSlowOutput: an Output that hangs stops the guest's writes, not a pause,
// and loses nothing.
func TestSlowOutput(t *testing.T) {
	dev, d, output := started(t)
	output.mu.Lock()
	q := d.Queue(transmitQueue)
	line := bytes.Repeat([]byte("x"), 32<<10)
	var heads []uint16
	for range 8 { // 256 KiB, twice the buffer
		heads = append(heads, q.Submit([][]byte{line}))
	}
	q.Kick()
	q.Wait(heads[0])
	d.Function.Pause()
	if err := d.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	q.Reap()
	if q.Done(heads[7]) {
		t.Error("the last chain was taken while nothing is written")
	}
	output.mu.Unlock()
	for _, head := range heads {
		q.Wait(head)
	}
	flush(t, dev)
	if got := len(output.String()); got != 8*len(line) {
		t.Errorf("%d bytes of output, want %d", got, 8*len(line))
	}
}

func TestInput(t *testing.T) {
	dev, d, _ := started(t)
	q := d.Queue(receiveQueue)
	first, second := q.Submit(nil, 4), q.Submit(nil, 2, 6)
	q.Kick()
	if n, err := dev.WriteInput(t.Context(), []byte("hello, guest")); n != 12 || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	if got := string(q.Wait(first)) + string(q.Wait(second)); got != "hello, guest" {
		t.Errorf("got %q", got)
	}
	// Input before there is a buffer waits for one.
	if _, err := dev.WriteInput(t.Context(), []byte("later")); err != nil {
		t.Fatal(err)
	}
	if got := string(q.Do(nil, 64)); got != "later" {
		t.Errorf("got %q", got)
	}
}

func TestInputIsBounded(t *testing.T) {
	dev := newDevice(t, &recorder{})
	ctx, cancel := context.WithCancel(t.Context())
	if n, err := dev.WriteInput(ctx, make([]byte, inputSize)); n != inputSize || err != nil {
		t.Fatalf("%d, %v", n, err)
	}
	done := make(chan error, 1)
	go func() {
		_, err := dev.WriteInput(ctx, []byte("x"))
		done <- err
	}()
	cancel()
	if err := <-done; !errors.Is(err, context.Canceled) {
		t.Errorf("a full buffer: %v", err)
	}
	go func() {
		_, err := dev.WriteInput(t.Context(), []byte("x"))
		done <- err
	}()
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; !errors.Is(err, ErrClosed) {
		t.Errorf("a closed device: %v", err)
	}
}

func TestSizeAndEmergency(t *testing.T) {
	dev, d, output := started(t)
	config := d.Message(-1)
	before := d.Machine.MSIs.Count(config)
	dev.Resize(132, 50)
	got := d.DeviceConfig(0, 4)
	if cols, rows := binary.LittleEndian.Uint16(got), binary.LittleEndian.Uint16(got[2:]); cols != 132 || rows != 50 {
		t.Errorf("%d x %d", cols, rows)
	}
	if n := d.Machine.MSIs.Count(config) - before; n != 1 {
		t.Errorf("%d configuration interrupts, want 1", n)
	}
	dev.Resize(132, 50)
	if n := d.Machine.MSIs.Count(config) - before; n != 1 {
		t.Errorf("%d configuration interrupts after no change, want 1", n)
	}
	d.Reset()
	dev.Resize(80, 24)
	d.Write(d.Config+configEmergency, 4, 'A')
	d.Write(d.Config+configEmergency, 1, 'B')
	d.Write(d.Config+configEmergency+1, 1, 'C')
	flush(t, dev)
	if output.String() != "AB" {
		t.Errorf("emergency output %q", output.String())
	}
}

func TestMalformed(t *testing.T) {
	for _, test := range []struct {
		name  string
		queue int
		out   [][]byte
		in    []int
	}{
		{"output with room for input", transmitQueue, [][]byte{{1}}, []int{16}},
		{"output too long", transmitQueue, [][]byte{make([]byte, maxOutput+1)}, nil},
		{"input with output", receiveQueue, [][]byte{{1}}, []int{16}},
		{"input without room", receiveQueue, [][]byte{{1}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			dev, d, _ := started(t)
			if _, err := dev.WriteInput(t.Context(), []byte("x")); err != nil {
				t.Fatal(err)
			}
			if got := d.Queue(test.queue).Do(test.out, test.in...); len(got) != 0 {
				t.Errorf("got %q", got)
			}
			if d.Status()&virtio.StatusNeedsReset == 0 {
				t.Error("the driver's fault was not reported")
			}
		})
	}
}

func TestState(t *testing.T) {
	dev := newDevice(t, &recorder{})
	if _, err := dev.WriteInput(t.Context(), []byte("typed ahead")); err != nil {
		t.Fatal(err)
	}
	s := dev.State()
	other, d, _ := started(t)
	d.Reset()
	if err := other.SetState(s); err != nil {
		t.Fatal(err)
	}
	d.Start(0, 16)
	if got := string(d.Queue(receiveQueue).Do(nil, 64)); got != "typed ahead" {
		t.Errorf("got %q", got)
	}
	if err := other.SetState(State{Input: make([]byte, inputSize+1)}); !errors.Is(err, ErrState) {
		t.Errorf("too much input: %v", err)
	}
}

func TestAllocations(t *testing.T) {
	dev := newDevice(t, &recorder{})
	out := &virtio.Chain{Readable: []virtio.Buffer{{Data: make([]byte, 16)}}, ReadableBytes: 16}
	in := &virtio.Chain{Writable: []virtio.Buffer{{Data: make([]byte, 16)}}, WritableBytes: 16}
	if n := testing.AllocsPerRun(100, func() {
		_, _ = dev.takeInput(in)
		_, _ = dev.putOutput(out)
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// FuzzRing compares the ring with a slice.
func FuzzRing(f *testing.F) {
	f.Add([]byte{3, 130, 9, 140, 1, 1, 1, 200})
	f.Fuzz(func(t *testing.T, ops []byte) {
		const size = 13
		r := newRing(size)
		var want []byte
		next := byte(0)
		for _, op := range ops {
			n := int(op & 0x7F)
			p := make([]byte, n)
			if op&0x80 != 0 {
				got := p[:r.take(p)]
				if k := min(n, len(want)); !bytes.Equal(got, want[:k]) {
					t.Fatalf("took %v, want %v", got, want[:k])
				}
				want = want[len(got):]
				continue
			}
			for i := range p {
				next++
				p[i] = next
			}
			k := min(n, size-len(want))
			if got := r.put(p); got != k {
				t.Fatalf("put %d of %d, want %d", got, n, k)
			}
			want = append(want, p[:k]...)
		}
	})
}

func FuzzDevice(f *testing.F) {
	virtiotest.Fuzz(f, func(tb testing.TB) virtio.Device {
		d := newDevice(tb, &recorder{})
		if _, err := d.WriteInput(tb.Context(), []byte("some input")); err != nil {
			tb.Fatal(err)
		}
		return d
	})
}
