package net

import (
	"errors"
	"testing"
)

func TestHeader(t *testing.T) {
	want := Header{Flags: 1, GSOType: 4, Length: 0x1234, GSOSize: 0x5678, CsumStart: 0x9abc, CsumOffset: 0xdef0, NumBuffers: 0x1122}
	var raw [HeaderSize]byte
	want.Put(&raw)
	// The layout of struct virtio_net_hdr, little-endian.
	if golden := [HeaderSize]byte{1, 4, 0x34, 0x12, 0x78, 0x56, 0xbc, 0x9a, 0xf0, 0xde, 0x22, 0x11}; raw != golden {
		t.Errorf("encoded as %x, want %x", raw, golden)
	}
	if got := ParseHeader(&raw); got != want {
		t.Errorf("decoded as %+v, want %+v", got, want)
	}
}

func TestCheck(t *testing.T) {
	const all = ^unknownGSO
	tcp := Header{Flags: flagNeedsCsum, GSOType: gsoTCPv4, Length: 54, GSOSize: 1460, CsumStart: 34, CsumOffset: 16}
	change := func(f func(*Header)) Header {
		h := tcp
		f(&h)
		return h
	}
	for _, test := range []struct {
		name     string
		h        Header
		features uint64
		bytes    int
		ok       bool
	}{
		{"nothing", Header{}, 0, 60, true},
		{"num_buffers is ignored", Header{NumBuffers: 7}, 0, 60, true},
		{"checksum", Header{Flags: flagNeedsCsum, CsumStart: 34, CsumOffset: 6}, featureCsum, 60, true},
		{"checksum not negotiated", Header{Flags: flagNeedsCsum, CsumStart: 34, CsumOffset: 6}, 0, 60, false},
		{"checksum at the very end", Header{Flags: flagNeedsCsum, CsumStart: 50, CsumOffset: 8}, featureCsum, 60, true},
		{"checksum past the end", Header{Flags: flagNeedsCsum, CsumStart: 50, CsumOffset: 9}, featureCsum, 60, false},
		{"checksum far past the end", Header{Flags: flagNeedsCsum, CsumStart: 0xffff, CsumOffset: 0xffff}, featureCsum, 60, false},
		{"tcp4", tcp, all, 9000, true},
		{"tcp6", change(func(h *Header) { h.GSOType = gsoTCPv6 }), all, 9000, true},
		{"tcp4 with ECN", change(func(h *Header) { h.GSOType |= gsoECN }), all, 9000, true},
		{"uso", change(func(h *Header) { h.GSOType = gsoUDP }), all, 9000, true},
		{"tcp4 not negotiated", tcp, all &^ featureHostTSO4, 9000, false},
		{"ECN not negotiated", change(func(h *Header) { h.GSOType |= gsoECN }), all &^ featureHostECN, 9000, false},
		{"uso not negotiated", change(func(h *Header) { h.GSOType = gsoUDP }), all &^ featureHostUSO, 9000, false},
		{"ufo", change(func(h *Header) { h.GSOType = 3 }), all, 9000, false},
		{"unknown type", change(func(h *Header) { h.GSOType = 0x7f }), all, 9000, false},
		{"ECN alone", change(func(h *Header) { h.GSOType = gsoECN }), all, 9000, false},
		{"segments without a checksum", change(func(h *Header) { h.Flags = 0 }), all, 9000, false},
		{"segments of nothing", change(func(h *Header) { h.GSOSize = 0 }), all, 9000, false},
		{"headers longer than the frame", change(func(h *Header) { h.Length = 9001 }), all, 9000, false},
	} {
		err := test.h.Check(test.features, test.bytes)
		if (err == nil) != test.ok || err != nil && !errors.Is(err, errHeader) {
			t.Errorf("%s: %v, want ok %t", test.name, err, test.ok)
		}
	}
}

func TestAcceptable(t *testing.T) {
	for _, test := range []struct {
		flags, gso uint8
		features   uint64
		ok         bool
	}{
		{0, gsoNone, 0, true},
		{flagDataValid, gsoNone, 0, true},
		{flagNeedsCsum, gsoNone, 0, false},
		{flagNeedsCsum, gsoNone, featureGuestCsum, true},
		{flagNeedsCsum, gsoTCPv4, featureGuestCsum, false},
		{flagNeedsCsum, gsoTCPv4, featureGuestCsum | featureGuestTSO4, true},
		{flagNeedsCsum, gsoTCPv4 | gsoECN, featureGuestCsum | featureGuestTSO4, false},
		{flagNeedsCsum, gsoTCPv6 | gsoECN, featureGuestCsum | featureGuestTSO6 | featureGuestECN, true},
		{flagNeedsCsum, gsoUDP, featureGuestCsum | featureGuestUSO4, true},
		{flagNeedsCsum, gsoUDP, featureGuestCsum | guestSegments&^(featureGuestUSO4|featureGuestUSO6), false},
		{0, 0x7f, ^uint64(0), false},
	} {
		if got := acceptable(test.flags, test.gso, test.features); got != test.ok {
			t.Errorf("%+v: %t", test, got)
		}
	}
}

// FuzzHeader: what Check accepts keeps every field inside the frame.
func FuzzHeader(f *testing.F) {
	f.Add([]byte{1, 1, 54, 0, 0xb4, 5, 34, 0, 16, 0, 0, 0}, uint64(1<<62-1), uint16(9000))
	f.Add([]byte{1, 0, 0, 0, 0, 0, 50, 0, 8, 0, 0, 0}, uint64(1), uint16(60))
	f.Fuzz(func(t *testing.T, p []byte, features uint64, size uint16) {
		if len(p) < HeaderSize {
			return
		}
		raw := [HeaderSize]byte(p)
		h := ParseHeader(&raw)
		var again [HeaderSize]byte
		if h.Put(&again); again != raw {
			t.Fatalf("%x came back as %x", raw, again)
		}
		if h.Check(features&^unknownGSO, int(size)) != nil {
			return
		}
		if h.Flags&flagNeedsCsum != 0 && int(h.CsumStart)+int(h.CsumOffset)+2 > int(size) {
			t.Fatalf("checksum outside the frame of %d bytes: %+v", size, h)
		}
		if h.GSOType != gsoNone && (h.GSOSize == 0 || h.Flags&flagNeedsCsum == 0 || features&offloads == 0) {
			t.Fatalf("segments that nobody can make: %+v", h)
		}
	})
}
