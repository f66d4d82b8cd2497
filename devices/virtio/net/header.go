package net

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// HeaderSize is the length in bytes of struct virtio_net_hdr as every frame
// carries it with VIRTIO_F_VERSION_1 (virtio 1.2 5.1.6).
const HeaderSize = 12

// Lengths of frames in bytes.
const (
	// ethernetSize is an Ethernet header.
	ethernetSize = 14
	// maxOverhead is an Ethernet header and a VLAN tag.
	maxOverhead = ethernetSize + 4
	// MaxFrame is the longest frame: an IP packet of 65535 bytes that is to
	// be cut into segments later.
	MaxFrame = 65535 + maxOverhead
)

// Where the fields lie.
const (
	headerFlags      = 0
	headerGSOType    = 1
	headerNumBuffers = 10
)

// Values of Header.Flags.
const (
	flagNeedsCsum = 1
	flagDataValid = 2
)

// Values of Header.GSOType.
const (
	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4
	gsoUDP   = 5    // USO
	gsoECN   = 0x80 // added to TCP types
)

// Header says what is left to do for a frame: complete a checksum, cut it into
// segments.
type Header struct {
	Flags      uint8
	GSOType    uint8
	Length     uint16 // of the headers to repeat, a hint
	GSOSize    uint16 // payload of a segment
	CsumStart  uint16
	CsumOffset uint16 // from CsumStart
	NumBuffers uint16 // on receive
}

// errHeader is wrapped by every header that does not fit its frame.
var errHeader = errors.New("invalid network header")

// ParseHeader decodes a header.
func ParseHeader(p *[HeaderSize]byte) Header {
	return Header{
		Flags:      p[0],
		GSOType:    p[1],
		Length:     binary.LittleEndian.Uint16(p[2:]),
		GSOSize:    binary.LittleEndian.Uint16(p[4:]),
		CsumStart:  binary.LittleEndian.Uint16(p[6:]),
		CsumOffset: binary.LittleEndian.Uint16(p[8:]),
		NumBuffers: binary.LittleEndian.Uint16(p[10:]),
	}
}

// Put encodes the header.
func (h Header) Put(p *[HeaderSize]byte) {
	p[0], p[1] = h.Flags, h.GSOType
	binary.LittleEndian.PutUint16(p[2:], h.Length)
	binary.LittleEndian.PutUint16(p[4:], h.GSOSize)
	binary.LittleEndian.PutUint16(p[6:], h.CsumStart)
	binary.LittleEndian.PutUint16(p[8:], h.CsumOffset)
	binary.LittleEndian.PutUint16(p[10:], h.NumBuffers)
}

// Check says what is wrong with the header that a driver put before a frame of
// frameBytes (virtio 1.2 5.1.6.2). What it accepts, the host's kernel may be
// given.
func (h Header) Check(features uint64, frameBytes int) error {
	if h.Flags&flagNeedsCsum != 0 {
		if features&featureCsum == 0 {
			return fmt.Errorf("%w: checksum offload was not negotiated", errHeader)
		}
		if end := int(h.CsumStart) + int(h.CsumOffset) + 2; end > frameBytes {
			return fmt.Errorf("%w: checksum at %d in a frame of %d bytes", errHeader, end-2, frameBytes)
		}
	}
	if h.GSOType == gsoNone {
		return nil
	}
	if features&hostFeature(h.GSOType) != hostFeature(h.GSOType) {
		return fmt.Errorf("%w: segmentation type %#x was not negotiated", errHeader, h.GSOType)
	}
	if h.Flags&flagNeedsCsum == 0 || h.GSOSize == 0 || int(h.Length) > frameBytes {
		return fmt.Errorf("%w: segments of %d bytes, flags %#x, headers of %d", errHeader, h.GSOSize, h.Flags, h.Length)
	}
	return nil
}

// unknownGSO is a feature that nobody negotiates.
const unknownGSO uint64 = 1 << 63

// hostFeature is what allows a driver to send a segmentation type.
func hostFeature(gsoType uint8) uint64 {
	switch gsoType {
	case gsoTCPv4:
		return featureHostTSO4
	case gsoTCPv6:
		return featureHostTSO6
	case gsoTCPv4 | gsoECN:
		return featureHostTSO4 | featureHostECN
	case gsoTCPv6 | gsoECN:
		return featureHostTSO6 | featureHostECN
	case gsoUDP:
		return featureHostUSO
	}
	return unknownGSO
}

// acceptable reports whether a driver with these guest offloads understands
// the header that a backend gave. A tap may hold frames from before the driver
// switched an offload off.
func acceptable(flags, gsoType uint8, features uint64) bool {
	if flags&flagNeedsCsum != 0 && features&featureGuestCsum == 0 {
		return false
	}
	switch gsoType {
	case gsoNone:
		return true
	case gsoTCPv4:
		return features&featureGuestTSO4 != 0
	case gsoTCPv6:
		return features&featureGuestTSO6 != 0
	case gsoTCPv4 | gsoECN:
		return features&featureGuestTSO4 != 0 && features&featureGuestECN != 0
	case gsoTCPv6 | gsoECN:
		return features&featureGuestTSO6 != 0 && features&featureGuestECN != 0
	case gsoUDP:
		return features&(featureGuestUSO4|featureGuestUSO6) != 0
	}
	return false
}
