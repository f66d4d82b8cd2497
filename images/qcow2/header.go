package qcow2

import (
	"encoding/binary"
	"fmt"
	"math/bits"
	"strings"

	"ditto.vm/images/disk"
)

// Magic is how a qcow2 file begins.
const Magic = "QFI\xfb"

// Offsets in the header (docs/interop/qcow2.rst, "Header").
const (
	offVersion       = 4
	offBackingOffset = 8
	offBackingSize   = 16
	offClusterBits   = 20
	offSize          = 24
	offCryptMethod   = 32
	offL1Size        = 36
	offL1Offset      = 40
	offRefOffset     = 48
	offRefClusters   = 56
	offSnapshots     = 60
	offSnapOffset    = 64
	offIncompatible  = 72
	offCompatible    = 80
	offAutoclear     = 88
	offRefcountOrder = 96
	offHeaderLength  = 100
	offCompression   = 104

	headerSizeV2 = 72
	headerSizeV3 = 104
	headerSize   = 112 // with the compression type
)

// Incompatible features.
const (
	featureDirty       = 1 << 0
	featureCorrupt     = 1 << 1
	featureDataFile    = 1 << 2
	featureCompression = 1 << 3
	featureExtendedL2  = 1 << 4

	featureLazyRefcounts = 1 << 0 // a compatible one
)

// Header extensions.
const (
	extensionEnd           = 0
	extensionBackingFormat = 0xe2792aca
	extensionFeatureNames  = 0x6803f857
	extensionBitmaps       = 0x23852875
)

// Bounds of what a header may ask for. They are QEMU's, so that every image it
// makes opens.
const (
	minClusterBits  = 9
	maxClusterBits  = 21
	maxL1Bytes      = 32 << 20
	maxRefTable     = 8 << 20
	maxBackingName  = 1023
	maxHeaderBytes  = 64 << 10 // looked at for extensions and the backing name
	maxRefcountBits = 6        // log2
)

// Compression is how compressed clusters are compressed.
type Compression byte

// The compression types.
const (
	Zlib Compression = iota // raw deflate
	Zstd
)

// String returns qemu-img's name.
func (c Compression) String() string {
	if c == Zstd {
		return "zstd"
	}
	return "zlib"
}

// Header is what an image says of itself.
type Header struct {
	Version     int
	ClusterBits uint
	// Size of the disk in bytes.
	Size int64
	// BackingFile is the name of the backing image as it is stored, "" for
	// none, and BackingFormat its format, "" if that is not stored.
	BackingFile, BackingFormat string
	Compression                Compression
	LazyRefcounts              bool
	// Dirty: the image was not closed by who wrote it last.
	Dirty bool
	// Corrupt: somebody found the image damaged.
	Corrupt bool
	// Snapshots is the number of internal snapshots.
	Snapshots int
	// Bitmaps: the image holds persistent dirty bitmaps.
	Bitmaps bool

	refcountOrder uint
	l1Offset      int64
	l1Entries     int
	refOffset     int64
	refClusters   int
	incompatible  uint64
	compatible    uint64
	autoclear     uint64
}

// ClusterSize in bytes.
func (h *Header) ClusterSize() int64 { return 1 << h.ClusterBits }

// RefcountBits is the width of a refcount.
func (h *Header) RefcountBits() int { return 1 << h.refcountOrder }

// l2Bits is log2 of the entries of an L2 table.
func (h *Header) l2Bits() uint { return h.ClusterBits - 3 }

// blockBits is log2 of the refcounts in a refcount block.
func (h *Header) blockBits() uint { return h.ClusterBits + 3 - h.refcountOrder }

// l1Needed is how many L1 entries a disk of size bytes needs.
func (h *Header) l1Needed(size int64) int64 {
	shift := h.ClusterBits + h.l2Bits()
	return (size + 1<<shift - 1) >> shift
}

const (
	cureDamaged     = "check it with 'qemu-img check', or restore it from a copy"
	cureUnsupported = "convert it with 'qemu-img convert -O qcow2'"
)

// refusal builds the error of an image that is not opened; Path is filled in
// by who knows it.
func refusal(cure, format string, args ...any) error {
	return &disk.Error{Reason: fmt.Sprintf(format, args...), Cure: cure}
}

// parseHeader reads the header from the beginning of a file of length bytes.
func parseHeader(b []byte, length int64) (*Header, error) {
	if len(b) < headerSizeV2 || string(b[:4]) != Magic {
		return nil, refusal(cureDamaged, "is no qcow2 image")
	}
	be := binary.BigEndian
	h := &Header{Version: int(be.Uint32(b[offVersion:])), refcountOrder: 4}
	headerLength := headerSizeV2
	switch h.Version {
	case 2:
	case 3:
		if len(b) < headerSizeV3 {
			return nil, refusal(cureDamaged, "its header is cut short")
		}
		n := be.Uint32(b[offHeaderLength:])
		if n < headerSizeV3 || int64(n) > int64(len(b)) || n%8 != 0 {
			return nil, refusal(cureDamaged, "its header length of %d bytes is invalid", n)
		}
		headerLength = int(n)
		h.incompatible, h.compatible = be.Uint64(b[offIncompatible:]), be.Uint64(b[offCompatible:])
		h.autoclear = be.Uint64(b[offAutoclear:])
		h.refcountOrder = uint(min(be.Uint32(b[offRefcountOrder:]), 64))
	default:
		return nil, refusal(cureUnsupported, "has version %d of the qcow2 format, which is not supported", h.Version)
	}
	size := be.Uint64(b[offSize:])
	h.ClusterBits = uint(min(be.Uint32(b[offClusterBits:]), 64))
	h.LazyRefcounts = h.compatible&featureLazyRefcounts != 0
	h.Dirty, h.Corrupt = h.incompatible&featureDirty != 0, h.incompatible&featureCorrupt != 0
	switch {
	case h.ClusterBits < minClusterBits || h.ClusterBits > maxClusterBits:
		return nil, refusal(cureDamaged, "its cluster size of 2^%d bytes is out of range", h.ClusterBits)
	case h.refcountOrder > maxRefcountBits:
		return nil, refusal(cureDamaged, "its refcounts of 2^%d bits are out of range", h.refcountOrder)
	case size >= 1<<62 || size%disk.SectorSize != 0:
		return nil, refusal(cureDamaged, "its size of %d bytes is invalid", size)
	}
	h.Size = int64(size)
	if h.incompatible&featureCompression != 0 && headerLength > offCompression {
		h.Compression = Compression(b[offCompression])
	}
	if err := h.parseTables(b, length); err != nil {
		return nil, err
	}
	names, err := h.parseExtensions(b, headerLength)
	if err != nil {
		return nil, err
	}
	return h, h.checkFeatures(be.Uint32(b[offCryptMethod:]), names)
}

// parseTables reads where the L1 table and the refcount table are.
func (h *Header) parseTables(b []byte, length int64) error {
	be := binary.BigEndian
	l1, ref := be.Uint64(b[offL1Offset:]), be.Uint64(b[offRefOffset:])
	entries, clusters := be.Uint32(b[offL1Size:]), be.Uint32(b[offRefClusters:])
	mask, end := uint64(h.ClusterSize()-1), uint64(length)
	switch refBytes := uint64(clusters) << h.ClusterBits; {
	case uint64(entries)*8 > maxL1Bytes || h.l1Needed(h.Size) > int64(entries):
		return refusal(cureDamaged, "its L1 table of %d entries is invalid for a disk of %d bytes", entries, h.Size)
	case l1&mask != 0 || l1 > end || uint64(entries)*8 > end-l1 || l1 == 0 && entries > 0:
		return refusal(cureDamaged, "its L1 table at %#x is not in the file", l1)
	case clusters == 0 || refBytes > maxRefTable:
		return refusal(cureDamaged, "its refcount table of %d clusters is invalid", clusters)
	case ref&mask != 0 || ref == 0 || ref >= end:
		return refusal(cureDamaged, "its refcount table at %#x is not in the file", ref)
	}
	h.l1Offset, h.l1Entries = int64(l1), int(entries)
	h.refOffset, h.refClusters = int64(ref), int(clusters)
	h.Snapshots = int(be.Uint32(b[offSnapshots:]))
	return nil
}

// parseExtensions reads the header extensions and the backing file's name. It
// returns the feature name table.
func (h *Header) parseExtensions(b []byte, at int) (names []byte, err error) {
	be := binary.BigEndian
	b = b[:min(int64(len(b)), h.ClusterSize())]
	nameAt, nameLen := be.Uint64(b[offBackingOffset:]), be.Uint32(b[offBackingSize:])
	end := len(b)
	if nameAt != 0 && nameLen != 0 {
		if nameAt < headerSizeV2 || nameLen > maxBackingName || nameAt > uint64(len(b)) || uint64(nameLen) > uint64(len(b))-nameAt {
			return nil, refusal(cureDamaged, "the name of its backing file, %d bytes at %#x, is invalid", nameLen, nameAt)
		}
		h.BackingFile = string(b[nameAt : nameAt+uint64(nameLen)])
		if strings.ContainsRune(h.BackingFile, 0) {
			return nil, refusal(cureDamaged, "the name of its backing file holds a zero byte")
		}
		end = int(nameAt)
	}
	for at+8 <= end {
		kind, n := be.Uint32(b[at:]), uint64(be.Uint32(b[at+4:]))
		at += 8
		if kind == extensionEnd {
			break
		}
		if n > uint64(end-at) {
			return nil, refusal(cureDamaged, "its header extension %#x of %d bytes is invalid", kind, n)
		}
		data := b[at : at+int(n)]
		switch kind {
		case extensionBackingFormat:
			h.BackingFormat = string(data)
		case extensionFeatureNames:
			names = data
		case extensionBitmaps:
			h.Bitmaps = true
		}
		at += int(n+7) &^ 7
	}
	return names, nil
}

// checkFeatures refuses, by name, what the image needs and this package lacks.
func (h *Header) checkFeatures(crypt uint32, names []byte) error {
	switch crypt {
	case 0:
	case 1:
		return refusal(cureUnsupported, "is encrypted (AES), which is not supported")
	case 2:
		return refusal(cureUnsupported, "is encrypted (LUKS), which is not supported")
	default:
		return refusal(cureUnsupported, "is encrypted by the unknown method %d", crypt)
	}
	if h.incompatible&featureDataFile != 0 {
		return refusal(cureUnsupported, "keeps its data in an external data file, which is not supported")
	}
	if h.incompatible&featureExtendedL2 != 0 {
		return refusal(cureUnsupported, "has extended L2 entries (subclusters), which are not supported")
	}
	const known = featureDirty | featureCorrupt | featureCompression
	if unknown := h.incompatible &^ known; unknown != 0 {
		return refusal(cureUnsupported, "needs the incompatible feature %s, which is not supported", featureName(names, bits.TrailingZeros64(unknown)))
	}
	if h.Compression > Zstd {
		return refusal(cureUnsupported, "is compressed by the unknown method %d", h.Compression)
	}
	return nil
}

// featureName finds the name of an incompatible feature in the feature name
// table: entries of a type byte, a bit number and 46 bytes of name.
func featureName(table []byte, bit int) string {
	const entry = 48
	for ; len(table) >= entry; table = table[entry:] {
		if table[0] == 0 && int(table[1]) == bit {
			name, _, _ := strings.Cut(string(table[2:entry]), "\x00")
			return fmt.Sprintf("%q (bit %d)", name, bit)
		}
	}
	return fmt.Sprintf("bit %d", bit)
}

// checkWritable refuses what may be read but not written.
func (h *Header) checkWritable() error {
	switch {
	case h.Corrupt:
		return refusal("repair it with 'qemu-img check -r all'", "is marked corrupt")
	case h.Snapshots > 0:
		return refusal("open it read-only, or delete them with 'qemu-img snapshot -d'", "has %d internal snapshots and cannot be written", h.Snapshots)
	case h.Bitmaps:
		return refusal("open it read-only, or delete them with 'qemu-img bitmap --remove'", "has persistent bitmaps and cannot be written")
	}
	return nil
}
