package net

import (
	"bytes"
	"encoding/binary"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/devices/virtio/virtiotest"
)

// macTable encodes one struct virtio_net_ctrl_mac.
func macTable(macs ...MAC) []byte {
	p := binary.LittleEndian.AppendUint32(nil, uint32(len(macs)))
	for _, m := range macs {
		p = append(p, m[:]...)
	}
	return p
}

func TestParseCommand(t *testing.T) {
	two := append(macTable(guestMAC), macTable(otherMAC, otherMAC)...)
	for _, test := range []struct {
		name string
		in   []byte
		want *command // nil: refused
	}{
		{"promiscuous on", []byte{0, 0, 1}, &command{on: true}},
		{"no broadcast off", []byte{0, 5, 0}, &command{code: 5}},
		{"unknown mode", []byte{0, 6, 0}, nil},
		{"mode neither on nor off", []byte{0, 0, 2}, nil},
		{"mode of two bytes", []byte{0, 0, 1, 0}, nil},
		{"tables", append([]byte{1, 0}, two...), &command{class: 1, unicast: guestMAC[:], multicast: append(otherMAC[:], otherMAC[:]...)}},
		{"empty tables", []byte{1, 0, 0, 0, 0, 0, 0, 0, 0, 0}, &command{class: 1, unicast: []byte{}, multicast: []byte{}}},
		{"one table", append([]byte{1, 0}, macTable(guestMAC)...), nil},
		{"tables and more", append(append([]byte{1, 0}, two...), 0), nil},
		{"table that is cut", append([]byte{1, 0}, two[:len(two)-1]...), nil},
		{"table that wraps", []byte{1, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0}, nil},
		{"address", append([]byte{1, 1}, guestMAC[:]...), &command{class: 1, code: 1, mac: guestMAC}},
		{"short address", []byte{1, 1, 2}, nil},
		{"vlan", []byte{2, 0, 0xff, 0x0f}, &command{class: 2, vid: 4095}},
		{"vlan off", []byte{2, 1, 5, 0}, &command{class: 2, code: 1, vid: 5}},
		{"vlan out of range", []byte{2, 0, 0, 0x10}, nil},
		{"announced", []byte{3, 0}, &command{class: 3}},
		{"queue pairs", []byte{4, 0, 2, 0}, nil},
		{"offloads", []byte{5, 0, 2, 0, 0, 0, 0, 0, 0, 1}, &command{class: 5, offloads: 1<<56 | 2}},
		{"unknown class", []byte{6, 0}, nil},
		{"one byte", []byte{0}, nil},
		{"nothing", nil, nil},
	} {
		got, err := parseCommand(test.in)
		if (err == nil) != (test.want != nil) {
			t.Errorf("%s: %v", test.name, err)
		} else if err == nil {
			if diff := cmp.Diff(*test.want, got, cmp.AllowUnexported(command{})); diff != "" {
				t.Errorf("%s: (-want +got)\n%s", test.name, diff)
			}
		}
	}
}

func FuzzCommand(f *testing.F) {
	f.Add([]byte{0, 0, 1})
	f.Add(append([]byte{1, 0}, append(macTable(guestMAC), macTable(otherMAC)...)...))
	f.Add([]byte{2, 0, 5, 0})
	f.Add([]byte{5, 0, 2, 0, 0, 0, 0, 0, 0, 0})
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := parseCommand(p)
		if err != nil {
			return
		}
		if len(c.unicast)%6 != 0 || len(c.multicast)%6 != 0 || c.vid >= maxVLAN || c.class == classRX && c.code >= numModes {
			t.Fatalf("%x is %+v", p, c)
		}
		filter := newFilter()
		filter.setTables(c.unicast, c.multicast)
		filter.setVLAN(c.vid, true)
		if len(filter.unicast) > maxTable || len(filter.multicast) > maxTable {
			t.Fatalf("%d and %d addresses", len(filter.unicast), len(filter.multicast))
		}
	})
}

func TestFilter(t *testing.T) {
	broadcast, group := MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, MAC{1, 0, 0x5e, 0, 0, 1}
	second := MAC{2, 2, 2, 2, 2, 2}
	start := func(to MAC, tag ...byte) *[filterBytes]byte {
		var s [filterBytes]byte
		copy(s[:], frame(otherMAC, to, filterBytes))
		copy(s[12:], tag)
		return &s
	}
	vlan := func(vid byte) *[filterBytes]byte { return start(guestMAC, 0x81, 0, 0xe0, vid) }
	modes := func(on ...int) filter {
		f := filter{}
		for _, m := range on {
			f.modes[m] = true
		}
		return f
	}
	listed := filter{unicast: []MAC{second}, multicast: []MAC{group}}
	tagged := filter{vlanFilter: true}
	tagged.setVLAN(5, true)
	tagged.setVLAN(6, true)
	tagged.setVLAN(6, false)
	tagged.modes[modePromiscuous] = true
	for _, test := range []struct {
		name  string
		f     filter
		start *[filterBytes]byte
		pass  bool
	}{
		{"reset, other", newFilter(), start(otherMAC), true},
		{"own", filter{}, start(guestMAC), true},
		{"other", filter{}, start(otherMAC), false},
		{"broadcast", filter{}, start(broadcast), true},
		{"multicast", filter{}, start(group), false},
		{"all unicast", modes(modeAllUnicast), start(otherMAC), true},
		{"all unicast, multicast", modes(modeAllUnicast), start(group), false},
		{"all multicast", modes(modeAllMulticast), start(group), true},
		{"no unicast", modes(modeNoUnicast), start(guestMAC), false},
		{"no multicast", modes(modeNoMulticast, modeAllMulticast), start(group), false},
		{"no broadcast", modes(modeNoBroadcast), start(broadcast), false},
		{"listed unicast", listed, start(second), true},
		{"listed multicast", listed, start(group), true},
		{"not listed", listed, start(otherMAC), false},
		{"too many unicast", filter{unicastFull: true}, start(otherMAC), true},
		{"too many multicast", filter{multicastFull: true}, start(group), true},
		{"vlan", tagged, vlan(5), true},
		{"removed vlan", tagged, vlan(6), false},
		{"untagged", tagged, start(guestMAC), true},
		{"vlan without a filter", newFilter(), vlan(7), true},
	} {
		if got := test.f.pass(test.start, guestMAC); got != test.pass {
			t.Errorf("%s: %t, want %t", test.name, got, test.pass)
		}
	}
}

// TestFiltering is the driver narrowing down what it gets.
func TestFiltering(t *testing.T) {
	dev, d, p := started(t, everything)
	control := func(want byte, out ...[]byte) {
		t.Helper()
		if got := d.Queue(controlQueue).Do(out, 1); !bytes.Equal(got, []byte{want}) {
			t.Fatalf("answer %v, want %d", got, want)
		}
	}
	q := d.Queue(receiveQueue)
	for range 16 {
		q.Submit(nil, 1600)
	}
	q.Kick()
	head := uint16(0)
	expect := func(n int) {
		t.Helper()
		if _, got := received(t, q.Wait(head)); len(got) != n {
			t.Fatalf("got a frame of %d bytes, want %d", len(got), n)
		}
		head++
	}
	p.send(frame(otherMAC, otherMAC, 60))
	expect(60)
	control(controlOK, []byte{classRX, modePromiscuous}, []byte{0})
	p.send(frame(otherMAC, otherMAC, 61), frame(otherMAC, guestMAC, 62))
	expect(62)
	control(controlOK, []byte{classMAC, commandMACTable}, macTable(otherMAC), macTable())
	p.send(frame(otherMAC, otherMAC, 63))
	expect(63)
	control(controlOK, []byte{classMAC, commandMACSet}, []byte{2, 0, 0, 0, 0, 7})
	if got, want := d.DeviceConfig(0, 6), []byte{2, 0, 0, 0, 0, 7}; !bytes.Equal(got, want) {
		t.Errorf("address %x, want %x", got, want)
	}
	p.send(frame(otherMAC, guestMAC, 64), frame(otherMAC, dev.MAC(), 65))
	expect(65)
	control(controlError, []byte{classMAC, commandMACSet}, []byte{1, 0, 0, 0, 0, 7})
	control(controlError, []byte{classMAC, commandMACSet}, make([]byte, 6))
	control(controlError, []byte{classOffloads, 0}, []byte{2, 0, 0, 0, 0, 0, 0, 0}) // not negotiated
	control(controlError, make([]byte, maxControl+1))
	if c := dev.Counters(); c.ReceiveDropped != 2 {
		t.Errorf("counters %+v", c)
	}
	d.Start(everything, 64)
	if got := d.DeviceConfig(0, 6); !bytes.Equal(got, guestMAC[:]) {
		t.Errorf("address %x after a reset, want %x", got, guestMAC)
	}
}

func TestAnnounce(t *testing.T) {
	dev, d, p := started(t, everything)
	changed := d.Machine.MSIs.Arrived(d.Message(-1))
	if err := dev.Announce(); err != nil {
		t.Fatal(err)
	}
	<-changed
	want := rarp(guestMAC)
	if got := p.receive(); !bytes.Equal(got, want[:]) {
		t.Errorf("announced with %x", got)
	}
	if status := d.DeviceConfig(configStatus, 1)[0]; status != statusLinkUp|statusAnnounce {
		t.Errorf("status %#x", status)
	}
	d.Queue(controlQueue).Do([][]byte{{classAnnounce, commandAnnounceAck}}, 1)
	if status := d.DeviceConfig(configStatus, 1)[0]; status != statusLinkUp {
		t.Errorf("status %#x after the driver's word", status)
	}
	// A driver that cannot do it is announced by the device alone.
	d.Start(everything&^featureGuestAnnounce, 64)
	if err := dev.Announce(); err != nil {
		t.Fatal(err)
	}
	if got := p.receive(); !bytes.Equal(got, want[:]) {
		t.Errorf("announced with %x", got)
	}
	if status := d.DeviceConfig(configStatus, 1)[0]; status != statusLinkUp {
		t.Errorf("status %#x for a driver that cannot announce", status)
	}
	d.Reset()
	if err := dev.Announce(); err == nil {
		t.Error("announced without a driver")
	}
}

// TestState carries what the driver has set to another device.
func TestState(t *testing.T) {
	s, _ := newStream(t)
	from := newDevice(t, Config{Backend: s})
	d := virtiotest.NewDriver(t, from)
	d.Start(everything, 64)
	for _, out := range [][][]byte{
		{{classRX, modePromiscuous}, {0}},
		{{classMAC, commandMACTable}, macTable(otherMAC), macTable(MAC{1, 2, 3, 4, 5, 6})},
		{{classVLAN, commandVLANAdd}, {5, 0}},
		{{classMAC, commandMACSet}, {2, 0, 0, 0, 0, 7}},
	} {
		d.Queue(controlQueue).Do(out, 1)
	}
	if err := from.Announce(); err != nil {
		t.Fatal(err)
	}
	d.Function.Pause()
	saved := from.State()
	want := State{MAC: MAC{2, 0, 0, 0, 0, 7}, Announce: true, Unicast: []MAC{otherMAC}, Multicast: []MAC{{1, 2, 3, 4, 5, 6}}}
	want.VLANs[0] = 1 << 5
	if diff := cmp.Diff(want, saved); diff != "" {
		t.Errorf("saved (-want +got)\n%s", diff)
	}

	s, p := newStream(t)
	to := newDevice(t, Config{Backend: s})
	if err := to.SetState(saved); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(saved, to.State()); diff != "" {
		t.Errorf("restored (-want +got)\n%s", diff)
	}
	d = virtiotest.NewDriver(t, to)
	d.Negotiate(everything)
	d.EnableMSIX()
	d.SetupQueues(16)
	d.SetStatus(4) // DRIVER_OK without a reset, as after a restore
	q := d.Queue(receiveQueue)
	head := q.Submit(nil, 1600)
	q.Kick()
	p.send(frame(otherMAC, guestMAC, 60), frame(otherMAC, otherMAC, 61))
	if _, got := received(t, q.Wait(head)); len(got) != 61 {
		t.Errorf("the filter was not restored: got %d bytes", len(got))
	}

	for name, spoil := range map[string]func(*State){
		"address":   func(s *State) { s.MAC[0] |= 1 },
		"offloads":  func(s *State) { s.Offloads = featureGuestCsum },
		"addresses": func(s *State) { s.Unicast = make([]MAC, maxTable+1) },
	} {
		bad := saved
		spoil(&bad)
		if err := newDevice(t, Config{}).SetState(bad); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}
