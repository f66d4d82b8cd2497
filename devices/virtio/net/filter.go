package net

import (
	"encoding/binary"
	"slices"
)

// MAC is an Ethernet address.
type MAC [6]byte

func (m MAC) multicast() bool { return m[0]&1 != 0 }
func (m MAC) broadcast() bool { return m == MAC{0xff, 0xff, 0xff, 0xff, 0xff, 0xff} }

// maxTable bounds each address table of the filter. A driver that wants more
// gets every frame of the kind, which it must expect (virtio 1.2 5.1.6.5.2).
const maxTable = 64

// maxVLAN is the number of VLAN IDs.
const maxVLAN = 4096

// filter decides which frames the driver wants (virtio 1.2 5.1.6.5.1 to 3).
// The zero value passes nothing but frames to the device's address and
// broadcasts.
type filter struct {
	modes                      [numModes]bool // by command of the RX class
	unicast, multicast         []MAC
	unicastFull, multicastFull bool // the table was too long
	vlanFilter                 bool // CTRL_VLAN was negotiated
	vlans                      [maxVLAN / 64]uint64
}

// newFilter is the filter of a device that was reset: it passes everything
// until the driver says otherwise.
func newFilter() filter {
	f := filter{}
	f.modes[modePromiscuous] = true
	return f
}

// filterBytes is what of a frame the filter looks at: both addresses and a
// VLAN tag.
const filterBytes = maxOverhead

// pass reports whether a frame that begins with start goes to a device with
// the address own.
func (f *filter) pass(start *[filterBytes]byte, own MAC) bool {
	if f.vlanFilter && binary.BigEndian.Uint16(start[12:]) == 0x8100 {
		vid := binary.BigEndian.Uint16(start[14:]) % maxVLAN
		if f.vlans[vid/64]&(1<<(vid%64)) == 0 {
			return false
		}
	}
	if f.modes[modePromiscuous] {
		return true
	}
	switch to := MAC(start[:6]); {
	case to.broadcast():
		return !f.modes[modeNoBroadcast]
	case to.multicast():
		if f.modes[modeNoMulticast] {
			return false
		}
		return f.modes[modeAllMulticast] || f.multicastFull || slices.Contains(f.multicast, to)
	default:
		if f.modes[modeNoUnicast] {
			return false
		}
		return to == own || f.modes[modeAllUnicast] || f.unicastFull || slices.Contains(f.unicast, to)
	}
}

// setTables replaces the address tables.
func (f *filter) setTables(unicast, multicast []byte) {
	f.unicast, f.unicastFull = table(f.unicast[:0], unicast)
	f.multicast, f.multicastFull = table(f.multicast[:0], multicast)
}

// table decodes addresses into macs, or says that there are too many.
func table(macs []MAC, p []byte) ([]MAC, bool) {
	if len(p) > maxTable*len(MAC{}) {
		return macs, true
	}
	for ; len(p) >= len(MAC{}); p = p[len(MAC{}):] {
		macs = append(macs, MAC(p[:6]))
	}
	return macs, false
}

func (f *filter) setVLAN(vid uint16, on bool) {
	bit := uint64(1) << (vid % 64)
	if on {
		f.vlans[vid/64] |= bit
	} else {
		f.vlans[vid/64] &^= bit
	}
}
