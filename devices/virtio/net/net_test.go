package net

import (
	"bytes"
	"encoding/binary"
	"io"
	"math/rand/v2"
	"testing"
	"time"

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

// received splits what the driver got into header and frame.
func received(t *testing.T, p []byte) (Header, []byte) {
	t.Helper()
	if len(p) < HeaderSize {
		t.Fatalf("%d bytes are no frame", len(p))
	}
	return ParseHeader((*[HeaderSize]byte)(p)), p[HeaderSize:]
}

func TestReceive(t *testing.T) {
	for _, merge := range []bool{true, false} {
		features := everything
		if !merge {
			features &^= featureMergeBuffers
		}
		dev, d, p := started(t, features)
		q := d.Queue(receiveQueue)
		var heads []uint16
		for range 16 {
			heads = append(heads, q.Submit(nil, 100, 1500))
		}
		q.Kick()
		for i, n := range []int{ethernetSize, 60, 1514} {
			want := frame(otherMAC, guestMAC, n)
			p.send(want)
			h, got := received(t, q.Wait(heads[i]))
			if !bytes.Equal(got, want) || h.NumBuffers != 1 || h.Flags != 0 || h.GSOType != 0 {
				t.Errorf("merge %t: a frame of %d bytes came as %+v and %d bytes", merge, n, h, len(got))
			}
		}
		if c := dev.Counters(); c.ReceivedFrames != 3 || c.ReceivedBytes != 14+60+1514 || c.ReceiveDropped != 0 {
			t.Errorf("merge %t: counters %+v", merge, c)
		}
	}
}

// TestMergedFrame: a frame that takes several buffers.
func TestMergedFrame(t *testing.T) {
	s, p := newStream(t)
	d := virtiotest.NewDriver(t, newDevice(t, Config{Backend: s, MTU: 65000}))
	d.Start(everything, 64)
	q := d.Queue(receiveQueue)
	for _, buffer := range []int{12, 1536, 4096} {
		const n = 3000
		want := frame(otherMAC, guestMAC, n)
		count := (HeaderSize + n + buffer - 1) / buffer
		if count > q.Size() {
			want = want[:buffer*40-HeaderSize]
			count = 40
		}
		// Fewer than a frame of 65000 bytes needs: it goes by the bounce
		// buffer, in which it waits for the last one.
		p.send(want)
		var got []byte
		var heads []uint16
		for range count {
			heads = append(heads, q.Submit(nil, buffer))
			q.Kick()
		}
		for _, head := range heads {
			got = append(got, q.Wait(head)...)
		}
		h, body := received(t, got)
		if !bytes.Equal(body, want) || int(h.NumBuffers) != count {
			t.Errorf("buffers of %d: %d bytes in %d, want %d in %d", buffer, len(body), h.NumBuffers, len(want), count)
		}
	}
}

// TestTooShortBuffers: frames that can never fit are dropped; what comes after
// arrives.
func TestTooShortBuffers(t *testing.T) {
	for _, merge := range []bool{true, false} {
		features := everything
		if !merge {
			features &^= featureMergeBuffers
		}
		s, p := newStream(t)
		dev := newDevice(t, Config{Backend: s})
		d := virtiotest.NewDriver(t, dev)
		d.Start(features, 4)
		q := d.Queue(receiveQueue)
		var heads []uint16
		for range 4 {
			heads = append(heads, q.Submit(nil, 200))
		}
		q.Kick()
		want := frame(otherMAC, guestMAC, 100)
		p.send(frame(otherMAC, guestMAC, 1514), want)
		if h, got := received(t, q.Wait(heads[0])); !bytes.Equal(got, want) || h.NumBuffers != 1 {
			t.Errorf("merge %t: got %d bytes in %d buffers", merge, len(got), h.NumBuffers)
		}
		if c := dev.Counters(); c.ReceiveDropped != 1 {
			t.Errorf("merge %t: counters %+v", merge, c)
		}
	}
}

// TestStarvation: frames wait in the socket for buffers.
func TestStarvation(t *testing.T) {
	_, d, p := started(t, everything)
	q := d.Queue(receiveQueue)
	var want [][]byte
	for i := range 40 {
		want = append(want, frame(otherMAC, guestMAC, 60+i))
	}
	p.send(want...)
	for i := range want {
		_, got := received(t, q.Do(nil, 1600))
		if !bytes.Equal(got, want[i]) {
			t.Fatalf("frame %d has %d bytes, want %d", i, len(got), len(want[i]))
		}
	}
}

// TestPauseHoldsBuffers: buffers that wait for frames are given back by a
// pause and serve again after it, here and in the device that takes over.
func TestPauseHoldsBuffers(t *testing.T) {
	_, d, p := started(t, everything)
	q := d.Queue(receiveQueue)
	var heads []uint16
	for range 8 {
		heads = append(heads, q.Submit(nil, 1600))
	}
	q.Kick()
	p.send(frame(otherMAC, guestMAC, 60))
	q.Wait(heads[0])
	d.Function.Pause()
	if _, err := d.Function.State(); err != nil {
		t.Fatal(err)
	}
	p.send(frame(otherMAC, guestMAC, 61))
	if err := d.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	if _, got := received(t, q.Wait(heads[1])); len(got) != 61 {
		t.Errorf("got %d bytes, want 61", len(got))
	}
}

// TestPeerCloses: the guest sees the link go down, and frames are dropped.
func TestPeerCloses(t *testing.T) {
	for _, buffers := range []bool{true, false} {
		dev, d, p := started(t, everything)
		if buffers {
			d.Queue(receiveQueue).Submit(nil, 1600)
			d.Queue(receiveQueue).Kick()
		}
		if status := d.DeviceConfig(configStatus, 1)[0]; status != statusLinkUp {
			t.Errorf("status %#x before", status)
		}
		changed := d.Machine.MSIs.Arrived(d.Message(-1))
		p.close()
		select {
		case <-changed:
		case <-time.After(virtiotest.Patience):
			t.Fatal("the driver was not told")
		}
		if status := d.DeviceConfig(configStatus, 1)[0]; status != 0 || dev.LinkUp() {
			t.Errorf("status %#x after", status)
		}
		d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))})
		d.Start(everything, 16)
		d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))})
	}
}

// TestHostilePeer: garbage from the socket ends the link, not the VMM.
func TestHostilePeer(t *testing.T) {
	dev, d, p := started(t, everything)
	changed := d.Machine.MSIs.Arrived(d.Message(-1))
	if _, err := unix.Write(p.fd, []byte{0xff, 0xff, 0xff, 0xff, 1, 2, 3}); err != nil {
		t.Fatal(err)
	}
	d.Queue(receiveQueue).Submit(nil, 1600)
	d.Queue(receiveQueue).Kick()
	<-changed
	if dev.LinkUp() {
		t.Error("the link is up")
	}
}

func TestSetLink(t *testing.T) {
	dev, d, p := started(t, everything)
	q := d.Queue(receiveQueue)
	head := q.Submit(nil, 1600)
	q.Kick()
	dev.SetLink(false)
	d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))})
	if c := dev.Counters(); c.SendDropped != 1 {
		t.Errorf("counters %+v", c)
	}
	dev.SetLink(true)
	d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 61))})
	if got := p.receive(); len(got) != 61 {
		t.Errorf("the frame of a link that is down arrived: %d bytes", len(got))
	}
	p.send(frame(otherMAC, guestMAC, 62))
	if _, got := received(t, q.Wait(head)); len(got) != 62 {
		t.Errorf("got %d bytes", len(got))
	}
}

func TestNoBackend(t *testing.T) {
	dev := newDevice(t, Config{})
	d := virtiotest.NewDriver(t, dev)
	d.Start(everything, 16)
	if status := d.DeviceConfig(configStatus, 1)[0]; status != 0 {
		t.Errorf("status %#x", status)
	}
	d.Queue(transmitQueue).Do([][]byte{headed(Header{}, frame(guestMAC, otherMAC, 60))})
	d.Queue(receiveQueue).Submit(nil, 1600)
	d.Queue(receiveQueue).Kick()
	if c := dev.Counters(); c.SendDropped != 1 {
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
