package net

import (
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio/virtiotest"
)

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
