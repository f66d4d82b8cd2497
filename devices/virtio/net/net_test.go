package net

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	guestMAC = MAC{0x52, 0x54, 0, 1, 2, 3}
	otherMAC = MAC{0x52, 0x54, 0, 9, 9, 9}
)

// peer is the far end of a stream backend.
type peer struct {
	tb testing.TB
	fd int
}

// newStream makes a stream backend and its peer.
func newStream(tb testing.TB) (*Stream, *peer) {
	tb.Helper()
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	s, err := NewStream(pair[0])
	if err != nil {
		tb.Fatal(err)
	}
	p := &peer{tb: tb, fd: pair[1]}
	timeout := unix.NsecToTimeval(int64(virtiotest.Patience))
	if err := unix.SetsockoptTimeval(p.fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout); err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		_ = unix.Close(pair[0])
		p.close()
	})
	return s, p
}

func (p *peer) close() {
	if p.fd >= 0 {
		_ = unix.Close(p.fd)
	}
	p.fd = -1
}

// Read implements io.Reader.
func (p *peer) Read(b []byte) (int, error) {
	n, err := unix.Read(p.fd, b)
	if n == 0 && err == nil {
		err = io.EOF
	}
	return max(n, 0), err
}

func (p *peer) send(frames ...[]byte) {
	p.tb.Helper()
	for _, f := range frames {
		f = append(binary.BigEndian.AppendUint32(nil, uint32(len(f))), f...)
		if _, err := unix.Write(p.fd, f); err != nil {
			p.tb.Fatal(err)
		}
	}
}

func (p *peer) receive() []byte {
	p.tb.Helper()
	var length [4]byte
	if _, err := io.ReadFull(p, length[:]); err != nil {
		p.tb.Fatal(err)
	}
	f := make([]byte, binary.BigEndian.Uint32(length[:]))
	if _, err := io.ReadFull(p, f); err != nil {
		p.tb.Fatal(err)
	}
	return f
}

// frame is n bytes from one address to another.
func frame(from, to MAC, n int) []byte {
	f := make([]byte, n)
	for i := range f {
		f[i] = byte(i * 7)
	}
	copy(f, to[:])
	copy(f[6:], from[:])
	copy(f[12:], []byte{0x08, 0x00})
	return f
}

func newDevice(tb testing.TB, config Config) *Device {
	tb.Helper()
	config.MAC = guestMAC
	d, err := New(config)
	if err != nil {
		tb.Fatal(err)
	}
	return d
}

// started is a device over a stream, and a driver that accepted features.
func started(tb testing.TB, features uint64) (*Device, *virtiotest.Driver, *peer) {
	tb.Helper()
	s, p := newStream(tb)
	dev := newDevice(tb, Config{Backend: s})
	d := virtiotest.NewDriver(tb, dev)
	d.Start(features, 64)
	return dev, d, p
}

// headed puts a header before a frame.
func headed(h Header, f []byte) []byte {
	var raw [HeaderSize]byte
	h.Put(&raw)
	return append(raw[:], f...)
}

const everything = ^uint64(0)

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New: func(tb testing.TB) virtio.Device {
			s, _ := newStream(tb)
			return newDevice(tb, Config{Backend: s, MTU: 9000})
		},
		Drained: []int{transmitQueue, controlQueue},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))})
			if got := d.Queue(controlQueue).Do([][]byte{{classRX, modePromiscuous}, {1}}, 1); !bytes.Equal(got, []byte{controlOK}) {
				tb.Errorf("control answer %v", got)
			}
		},
		Chain: func(d *virtiotest.Driver, queue int) []virtiotest.Segment {
			switch queue {
			case receiveQueue:
				return []virtiotest.Segment{{GPA: d.Alloc(1600, 16), Len: 1600, Write: true}}
			case transmitQueue:
				return []virtiotest.Segment{{GPA: d.Alloc(72, 16), Len: 72}}
			}
			return []virtiotest.Segment{{GPA: d.Alloc(3, 16), Len: 3}, {GPA: d.Alloc(1, 16), Len: 1, Write: true}}
		},
	})
}

func TestTransmit(t *testing.T) {
	dev, d, p := started(t, everything)
	q := d.Queue(transmitQueue)
	var bytesSent uint64
	for _, n := range []int{ethernetSize, 60, 1514, 9014, MaxFrame} {
		want := frame(guestMAC, otherMAC, n)
		whole := headed(Header{}, want)
		q.Do([][]byte{whole[:5], whole[5:20], whole[20:]})
		if got := p.receive(); !bytes.Equal(got, want) {
			t.Errorf("a frame of %d bytes arrived as %d others", n, len(got))
		}
		bytesSent += uint64(n)
	}
	c := dev.Counters()
	if c.SentFrames != 5 || c.SentBytes != bytesSent || c.SendDropped != 0 {
		t.Errorf("counters %+v", c)
	}
	// What the backend cannot do is dropped: nobody negotiated it.
	q.Do([][]byte{headed(Header{Flags: flagNeedsCsum}, frame(guestMAC, otherMAC, 60))})
	q.Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, ethernetSize-1))})
	q.Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, MaxFrame+1))})
	if c := dev.Counters(); c.SendDropped != 3 || c.SentFrames != 5 {
		t.Errorf("counters %+v", c)
	}
	if d.Status()&virtio.StatusNeedsReset != 0 {
		t.Error("the device wants a reset")
	}
}

// TestBackPressure: a peer that does not read holds the driver's frames up,
// loses none, and does not keep the device from being paused.
func TestBackPressure(t *testing.T) {
	dev, d, p := started(t, everything)
	q := d.Queue(transmitQueue)
	var heads []uint16
	const frames = 48
	for i := range frames {
		f := frame(guestMAC, otherMAC, MaxFrame)
		f[ethernetSize] = byte(i)
		heads = append(heads, q.Submit([][]byte{headed(Header{}, f)}))
	}
	q.Kick()
	q.Wait(heads[0])
	d.Function.Pause()
	if err := d.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	q.Reap()
	if q.Done(heads[frames-1]) {
		t.Error("3 MiB were sent while nobody reads")
	}
	for i := range frames {
		if got := p.receive(); len(got) != MaxFrame || got[ethernetSize] != byte(i) {
			t.Fatalf("frame %d is of %d bytes and has number %d", i, len(got), got[ethernetSize])
		}
	}
	for _, head := range heads {
		q.Wait(head)
	}
	if c := dev.Counters(); c.SentFrames != frames || c.SendDropped != 0 {
		t.Errorf("counters %+v", c)
	}
}

func TestConfigSpace(t *testing.T) {
	s, _ := newStream(t)
	d := virtiotest.NewDriver(t, newDevice(t, Config{Backend: s, MTU: 9000}))
	want := []byte{0x52, 0x54, 0, 1, 2, 3, statusLinkUp, 0, 1, 0, 0x28, 0x23}
	if got := d.DeviceConfig(0, 12); !bytes.Equal(got, want) {
		t.Errorf("configuration %x, want %x", got, want)
	}
	for _, bad := range []Config{{}, {MAC: MAC{1}}, {MAC: guestMAC, MTU: 67}, {MAC: guestMAC, MTU: 65536}} {
		if _, err := New(bad); err == nil {
			t.Errorf("%+v is accepted", bad)
		}
	}
}

func TestMalformed(t *testing.T) {
	for _, test := range []struct {
		name  string
		queue int
		out   [][]byte
		in    []int
	}{
		{"no header", transmitQueue, [][]byte{make([]byte, HeaderSize-1)}, nil},
		{"frame with room for an answer", transmitQueue, [][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))}, []int{16}},
		{"command without room for the answer", controlQueue, [][]byte{{0, 0, 0}}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, d, _ := started(t, everything)
			d.Queue(test.queue).Do(test.out, test.in...)
			if d.Status()&virtio.StatusNeedsReset == 0 {
				t.Error("the driver's fault was not reported")
			}
		})
	}
	t.Run("short receive buffer", func(t *testing.T) {
		_, d, p := started(t, everything)
		changed := d.Machine.MSIs.Arrived(d.Message(-1))
		q := d.Queue(receiveQueue)
		q.Submit(nil, HeaderSize-1)
		q.Kick()
		p.send(frame(otherMAC, guestMAC, 60))
		<-changed
		if d.Status()&virtio.StatusNeedsReset == 0 {
			t.Error("the driver's fault was not reported")
		}
		d.Function.Pause()
		if _, err := d.Function.State(); err != nil {
			t.Error(err)
		}
	})
}

// TestSoak sends and receives at random for a while, through pauses.
func TestSoak(t *testing.T) {
	_, d, p := started(t, everything)
	rng := rand.New(rand.NewPCG(1, 2))
	in, out := d.Queue(receiveQueue), d.Queue(transmitQueue)
	for range 300 {
		var want [][]byte
		var heads []uint16
		for range rng.IntN(20) + 1 {
			heads = append(heads, in.Submit(nil, 1600))
			want = append(want, frame(otherMAC, guestMAC, 14+rng.IntN(1500)))
		}
		in.Kick()
		p.send(want...)
		sent := frame(guestMAC, otherMAC, 14+rng.IntN(3000))
		out.Do([][]byte{headed(Header{}, sent)})
		if rng.IntN(4) == 0 {
			d.Function.Pause()
			if err := d.Function.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		for i, head := range heads {
			if _, got := received(t, in.Wait(head)); !bytes.Equal(got, want[i]) {
				t.Fatalf("frame of %d bytes came as %d others", len(want[i]), len(got))
			}
		}
		if got := p.receive(); !bytes.Equal(got, sent) {
			t.Fatalf("frame of %d bytes went as %d others", len(sent), len(got))
		}
	}
}
