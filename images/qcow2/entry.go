package qcow2

import (
	"errors"
	"fmt"
)

// Bits of L1 and L2 entries.
const (
	flagCopied     = 1 << 63 // the refcount is exactly one
	flagCompressed = 1 << 62
	flagZero       = 1 << 0
	offsetMask     = 1<<56 - 1<<9
	l1Reserved     = ^uint64(flagCopied | offsetMask)
	l2Reserved     = ^uint64(flagCopied | flagZero | offsetMask)
)

// ErrCorrupt is wrapped by what fails because the image is damaged.
var ErrCorrupt = errors.New("qcow2 image is corrupt: check it with 'qemu-img check'")

func corrupt(format string, args ...any) error {
	return fmt.Errorf("%s: %w", fmt.Sprintf(format, args...), ErrCorrupt)
}

// Kind says where the bytes of an extent are.
type Kind uint8

// The kinds.
const (
	// Unallocated: in the backing image, or zeros if there is none.
	Unallocated Kind = iota
	// Zero: they are zeros, whatever the backing image holds.
	Zero
	// Data: in the file.
	Data
	// Compressed: in the file, as one compressed cluster.
	Compressed
)

// String returns the kind's name.
func (k Kind) String() string {
	return [...]string{"unallocated", "zero", "data", "compressed"}[k&3]
}

// Extent is a range of the disk whose bytes are in one place.
type Extent struct {
	Kind Kind
	// Length in bytes.
	Length int64
	// Host is where it begins in the file, of Data.
	Host int64
	// InPlace: the clusters may be written where they are.
	InPlace bool

	entry uint64 // of the first cluster
}

// kindOf returns the kind of an L2 entry.
func kindOf(entry uint64) Kind {
	switch {
	case entry&flagCompressed != 0:
		return Compressed
	case entry&flagZero != 0:
		return Zero
	case entry&offsetMask != 0:
		return Data
	}
	return Unallocated
}

// compressedRange decodes the entry of a compressed cluster: where its bytes
// begin in the file, and how many there are at most. They end in some sector.
func (h *Header) compressedRange(entry uint64) (offset, n int64) {
	x := 62 - (h.ClusterBits - 8)
	offset = int64(entry & (1<<x - 1))
	sectors := int64(entry&^(flagCopied|flagCompressed)>>x) + 1
	return offset, sectors*512 - offset&511
}

// checkEntry validates an L2 entry.
func (h *Header) checkEntry(e uint64) error {
	if e&flagCompressed != 0 {
		if off, _ := h.compressedRange(e); off < h.ClusterSize() {
			return corrupt("L2 entry %#x points into the header", e)
		}
		return nil
	}
	reserved := l2Reserved
	if h.Version < 3 {
		reserved |= flagZero
	}
	switch off := e & offsetMask; {
	case e&reserved != 0 || off&uint64(h.ClusterSize()-1) != 0:
		return corrupt("L2 entry %#x is invalid", e)
	case e&flagCopied != 0 && off == 0:
		return corrupt("L2 entry %#x points into the header", e)
	}
	return nil
}
