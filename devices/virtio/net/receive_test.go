package net

import (
	"bytes"
	"testing"

	"ditto.vm/devices/virtio/virtiotest"
)

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
