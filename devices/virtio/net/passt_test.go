package net

import (
	"bytes"
	"encoding/binary"
	"os"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

// discover is a DHCPDISCOVER frame of the guest with a transaction number
// (RFC 2131).
func discover(xid uint32) []byte {
	f := make([]byte, 14+20+8+300)
	copy(f, []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff})
	copy(f[6:], guestMAC[:])
	f[12], f[13] = 8, 0
	ip, udp, bootp := f[14:34], f[34:42], f[42:]
	ip[0], ip[8], ip[9] = 0x45, 64, unix.IPPROTO_UDP
	binary.BigEndian.PutUint16(ip[2:], uint16(len(f)-14))
	copy(ip[16:], []byte{255, 255, 255, 255})
	binary.BigEndian.PutUint16(ip[10:], ^sum(0, ip))
	binary.BigEndian.PutUint16(udp[0:], 68)
	binary.BigEndian.PutUint16(udp[2:], 67)
	binary.BigEndian.PutUint16(udp[4:], uint16(8+len(bootp)))
	copy(bootp, []byte{1, 1, 6, 0}) // request, Ethernet
	binary.BigEndian.PutUint32(bootp[4:], xid)
	copy(bootp[28:], guestMAC[:])
	copy(bootp[236:], []byte{99, 130, 83, 99, 53, 1, 1, 255}) // DISCOVER
	pseudo := uint32(unix.IPPROTO_UDP) + uint32(8+len(bootp)) + uint32(sum(0, ip[12:20]))
	binary.BigEndian.PutUint16(udp[6:], ^sum(pseudo, f[34:]))
	return f
}

// TestPasst asks another program that speaks the stream's framing for an
// address.
func TestPasst(t *testing.T) {
	path, err := exec.LookPath("passt")
	if err != nil {
		t.Skip("no passt: try apt-get install passt")
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	theirs := os.NewFile(uintptr(pair[1]), "peer")
	cmd := exec.Command(path, "--foreground", "--fd", "3", "--address", "192.0.2.7", "--netmask", "255.255.255.0", "--gateway", "192.0.2.1")
	cmd.ExtraFiles = []*os.File{theirs}
	cmd.Stderr = t.Output()
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		_ = unix.Close(pair[0])
	})
	s, err := NewStream(pair[0])
	if err != nil {
		t.Fatal(err)
	}
	d := virtiotest.NewDriver(t, newDevice(t, Config{Backend: s}))
	changed := d.Machine.MSIs.Arrived(d.Message(-1))
	// Without EVENT_IDX every frame interrupts, so that waiting below ends.
	d.Start(everything&^virtio.FeatureEventIdx, 64)
	in := d.Queue(receiveQueue)
	var heads []uint16
	for range 32 {
		heads = append(heads, in.Submit(nil, 1600))
	}
	in.Kick()
	const xid = 0x12345678
	d.Queue(transmitQueue).Do([][]byte{headed(Header{}, discover(xid))})
	for _, head := range heads {
		in.Reap()
		if !in.Done(head) {
			select {
			case <-changed:
				t.Skip("passt does not run here: see its messages")
			case <-d.Machine.MSIs.Arrived(d.Message(receiveQueue)):
			case <-time.After(virtiotest.Patience):
				t.Fatal("no offer")
			}
		}
		_, f := received(t, in.Wait(head))
		if len(f) < 282 || f[23] != unix.IPPROTO_UDP || !bytes.Equal(f[36:38], []byte{0, 68}) {
			continue // neighbour discovery
		}
		bootp := f[42:]
		if bootp[0] != 2 || binary.BigEndian.Uint32(bootp[4:]) != xid || !bytes.Equal(bootp[16:20], []byte{192, 0, 2, 7}) {
			t.Errorf("offer %x", bootp[:20])
		}
		return
	}
	t.Error("no offer")
}
