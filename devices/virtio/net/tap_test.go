package net

import (
	"bytes"
	"encoding/binary"
	"errors"
	stdnet "net"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/internal/tap"
)

// The network of the tests: the host has .1, the guest .2.
var (
	hostIP   = stdnet.IPv4(192, 0, 2, 1).To4()
	guestIP  = stdnet.IPv4(192, 0, 2, 2).To4()
	hostPort = 4242
	port     = 4343 // of the guest
)

// hostNetwork is a tap in a network namespace of its own and the host's side of it.
type hostNetwork struct {
	tb   testing.TB
	tap  *tap.Tap
	mac  MAC
	conn int // a UDP socket of the host
}

// newHost makes the namespace. The test's thread is not unlocked, so that it
// ends with the test and the namespace with it.
func newHost(tb testing.TB) *hostNetwork {
	tb.Helper()
	if os.Getuid() != 0 {
		tb.Skip("making network namespaces takes root: run the test as root")
	}
	if _, err := os.Stat("/dev/net/tun"); err != nil {
		tb.Skip("no /dev/net/tun: try modprobe tun")
	}
	runtime.LockOSThread()
	h := &hostNetwork{tb: tb}
	h.check(unix.Unshare(unix.CLONE_NEWNET))
	// The kernel would send frames of its own.
	if err := os.WriteFile("/proc/sys/net/ipv6/conf/default/disable_ipv6", []byte("1"), 0); err != nil && !errors.Is(err, os.ErrNotExist) {
		tb.Fatal(err)
	}
	var err error
	h.tap, err = tap.Open(tap.Config{})
	h.check(err)
	tb.Cleanup(func() { _ = unix.Close(h.tap.FD) })
	link, err := netlink.LinkByName(h.tap.Name)
	h.check(err)
	h.mac = MAC(link.Attrs().HardwareAddr)
	h.check(netlink.AddrAdd(link, &netlink.Addr{IPNet: &stdnet.IPNet{IP: hostIP, Mask: stdnet.CIDRMask(24, 32)}}))
	h.check(netlink.NeighAdd(&netlink.Neigh{LinkIndex: link.Attrs().Index, IP: guestIP, HardwareAddr: guestMAC[:], State: netlink.NUD_PERMANENT}))
	h.conn, err = unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	h.check(err)
	tb.Cleanup(func() { _ = unix.Close(h.conn) })
	h.check(unix.Bind(h.conn, &unix.SockaddrInet4{Port: hostPort, Addr: [4]byte(hostIP)}))
	h.check(unix.Connect(h.conn, &unix.SockaddrInet4{Port: port, Addr: [4]byte(guestIP)}))
	timeout := unix.NsecToTimeval(int64(virtiotest.Patience))
	h.check(unix.SetsockoptTimeval(h.conn, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &timeout))
	return h
}

func (h *hostNetwork) check(err error) {
	h.tb.Helper()
	if err != nil {
		h.tb.Fatal(err)
	}
}

// device makes a device on the tap.
func (h *hostNetwork) device() *Device {
	h.tb.Helper()
	backend, err := NewTap(h.tap.FD)
	h.check(err)
	return newDevice(h.tb, Config{Backend: backend})
}

// send sends a datagram from the host, which the kernel may segment.
func (h *hostNetwork) send(payload []byte, segment int) {
	h.tb.Helper()
	h.check(unix.SetsockoptInt(h.conn, unix.SOL_UDP, unix.UDP_SEGMENT, segment))
	_, err := unix.Write(h.conn, payload)
	h.check(err)
}

// receive receives a datagram of the guest.
func (h *hostNetwork) receive() []byte {
	h.tb.Helper()
	p := make([]byte, MaxFrame)
	n, err := unix.Read(h.conn, p)
	h.check(err)
	return p[:n]
}

// datagram is a frame of the guest whose UDP checksum is partial: that of the
// pseudo header, the rest being left to the device.
func (h *hostNetwork) datagram(payload []byte) []byte {
	f := make([]byte, 14+20+8, 14+20+8+len(payload))
	copy(f, h.mac[:])
	copy(f[6:], guestMAC[:])
	f[12], f[13] = 8, 0
	ip := f[14:34]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(28+len(payload)))
	copy(ip[12:], guestIP)
	copy(ip[16:], hostIP)
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip))
	udp := f[34:42]
	binary.BigEndian.PutUint16(udp[0:], uint16(port))
	binary.BigEndian.PutUint16(udp[2:], uint16(hostPort))
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(payload)))
	binary.BigEndian.PutUint16(udp[6:], sum(uint32(unix.IPPROTO_UDP)+uint32(8+len(payload)), ip[12:20]))
	return append(f, payload...)
}

// sum is the Internet checksum of p, added to start.
func sum(start uint32, p []byte) uint16 {
	for ; len(p) >= 2; p = p[2:] {
		start += uint32(binary.BigEndian.Uint16(p))
	}
	if len(p) == 1 {
		start += uint32(p[0]) << 8
	}
	for start > 0xffff {
		start = start>>16 + start&0xffff
	}
	return uint16(start)
}

func numbered(n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i / 100)
	}
	return p
}

func TestTapOffers(t *testing.T) {
	h := newHost(t)
	d := virtiotest.NewDriver(t, h.device())
	const want = featureCsum | featureGuestCsum | featureCtrlOffloads | featureHostTSO4 | featureHostTSO6 | featureGuestTSO4 | featureGuestTSO6
	if offered := d.Offered(); offered&want != want {
		t.Errorf("offer %#x lacks %#x", offered, want&^offered)
	}
}

func TestTapTransmit(t *testing.T) {
	h := newHost(t)
	dev := h.device()
	d := virtiotest.NewDriver(t, dev)
	d.Start(everything, 64)
	q := d.Queue(transmitQueue)
	csum := Header{Flags: flagNeedsCsum, CsumStart: 34, CsumOffset: 6}

	q.Do([][]byte{headed(csum, h.datagram([]byte("hello, host")))})
	if got := h.receive(); string(got) != "hello, host" {
		t.Errorf("got %q", got)
	}
	if dev.Features()&featureHostUSO != 0 {
		uso := csum
		uso.GSOType, uso.GSOSize, uso.Length = gsoUDP, 1000, 42
		payload := numbered(2500)
		q.Do([][]byte{headed(uso, h.datagram(payload))})
		for _, want := range [][]byte{payload[:1000], payload[1000:2000], payload[2000:]} {
			if got := h.receive(); !bytes.Equal(got, want) {
				t.Errorf("a segment of %d bytes, want %d", len(got), len(want))
			}
		}
	}
	// A frame that the device refuses, one that the kernel does, and one of
	// many pieces.
	q.Do([][]byte{headed(Header{Flags: flagNeedsCsum, CsumStart: 34, CsumOffset: 600}, h.datagram([]byte("bad")))})
	var pieces [][]byte
	for _, b := range headed(csum, h.datagram([]byte("in pieces"))) {
		pieces = append(pieces, []byte{b})
	}
	q.Do(pieces[:60])
	q.Do(pieces)
	if got := h.receive(); string(got) != "in pieces" {
		t.Errorf("got %q", got)
	}
	if c := dev.Counters(); c.SendDropped != 1 {
		t.Errorf("counters %+v", c)
	}
}

func TestTapReceive(t *testing.T) {
	h := newHost(t)
	dev := h.device()
	d := virtiotest.NewDriver(t, dev)
	d.Start(everything, 64)
	q := d.Queue(receiveQueue)
	var heads []uint16
	for range 60 {
		heads = append(heads, q.Submit(nil, 1600))
	}
	q.Kick()

	h.send([]byte("hello, guest"), 0)
	hdr, got := received(t, q.Wait(heads[0]))
	if len(got) != 54 || string(got[42:]) != "hello, guest" || hdr.NumBuffers != 1 {
		t.Errorf("got %q with %+v", got, hdr)
	}
	if hdr.Flags != flagNeedsCsum || hdr.CsumStart != 34 || hdr.CsumOffset != 6 {
		t.Errorf("no checksum was left to the guest: %+v", hdr)
	}
	if dev.Features()&featureGuestUSO4 == 0 {
		t.Skip("this kernel's taps have no UDP segmentation: use Linux 6.2 or later")
	}
	payload := numbered(5000)
	h.send(payload, 1000)
	var whole []byte
	for _, head := range heads[1:5] {
		whole = append(whole, q.Wait(head)...)
	}
	hdr, got = received(t, whole)
	if len(got) != 42+5000 || !bytes.Equal(got[42:], payload) || hdr.GSOType != gsoUDP || hdr.GSOSize != 1000 || hdr.NumBuffers != 4 {
		t.Errorf("got %d bytes with %+v", len(got), hdr)
	}
	// The driver switches segments off: the kernel makes them.
	if got := d.Queue(controlQueue).Do([][]byte{{classOffloads, 0}, {byte(featureGuestCsum), 0, 0, 0, 0, 0, 0, 0}}, 1); !bytes.Equal(got, []byte{controlOK}) {
		t.Fatalf("answer %v", got)
	}
	h.send(payload, 1000)
	for i, head := range heads[5:10] {
		if hdr, got := received(t, q.Wait(head)); len(got) != 1042 || hdr.GSOType != gsoNone || !bytes.Equal(got[42:], payload[1000*i:1000*i+1000]) {
			t.Errorf("segment %d: %d bytes with %+v", i, len(got), hdr)
		}
	}
}

// TestTapPlain: a driver without offloads gets and sends finished frames.
func TestTapPlain(t *testing.T) {
	h := newHost(t)
	d := virtiotest.NewDriver(t, h.device())
	d.Start(0, 64)
	q := d.Queue(receiveQueue)
	head := q.Submit(nil, HeaderSize+1518) // as a driver without merging posts
	q.Kick()
	h.send([]byte("hello, guest"), 0)
	hdr, got := received(t, q.Wait(head))
	if hdr.Flags&flagNeedsCsum != 0 || sum(uint32(unix.IPPROTO_UDP)+uint32(len(got)-34)+uint32(sum(0, got[26:34])), got[34:]) != 0xffff {
		t.Errorf("the checksum is not complete: %+v, %x", hdr, got)
	}
}

func TestTapGone(t *testing.T) {
	h := newHost(t)
	dev := h.device()
	d := virtiotest.NewDriver(t, dev)
	d.Start(everything, 64)
	d.Queue(receiveQueue).Submit(nil, 1600)
	d.Queue(receiveQueue).Kick()
	changed := d.Machine.MSIs.Arrived(d.Message(-1))
	link, err := netlink.LinkByName(h.tap.Name)
	h.check(err)
	h.check(netlink.LinkDel(link))
	<-changed
	if dev.LinkUp() {
		t.Error("the link is up")
	}
}

// BenchmarkTapTransmit is a frame from guest memory to the host's stack. The
// long one is cut into segments there.
func BenchmarkTapTransmit(b *testing.B) {
	for _, size := range []int{1000, 65000} {
		b.Run(map[int]string{1000: "1K", 65000: "64K"}[size], func(b *testing.B) {
			h := newHost(b)
			dev := h.device()
			var tx transmitter
			tx.run = &run{device: dev, backend: dev.config.Backend}
			tx.run.Features = dev.Features()
			head := Header{Flags: flagNeedsCsum, CsumStart: 34, CsumOffset: 6}
			if size > 1500 {
				head.GSOType, head.GSOSize, head.Length = gsoUDP, 1000, 42
			}
			c := chainOf(headed(head, h.datagram(numbered(size))))
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if err := tx.send(c); err != nil {
					b.Fatal(err)
				}
			}
			if c := dev.Counters(); c.SendDropped > 0 {
				b.Errorf("counters %+v", c)
			}
		})
	}
}
