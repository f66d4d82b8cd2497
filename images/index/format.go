package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/xxh3"

	"ditto.vm/images/layer"
)

// ErrFormat is wrapped by every error about the bytes of an index: it is not an
// index, of another version, truncated or altered. The cure is to build it anew.
var ErrFormat = errors.New("not a usable index")

// The header. Offsets are in bytes.
const (
	offMagic      = 0   // 8 bytes
	offVersion    = 8   // u32
	offHeaderSize = 12  // u32
	offBlockSize  = 16  // u32
	offDigestKind = 20  // u32
	offLayerID    = 24  // 16 bytes
	offLayerSize  = 40  // u64
	offEntries    = 48  // u64
	offRuns       = 56  // u64
	offFanoutBits = 64  // u32
	offFilterRows = 68  // u32
	offStamp      = 72  // size, mtime, ctime, device, inode: 5 u64
	offFileSize   = 112 // u64
	offBodySum    = 120 // XXH3-128 of all bytes behind the header
	offHeaderSum  = 136 // XXH3-64 of the bytes before it
	headerUsed    = 144

	headerSize   = 4096
	magic        = "DITTOIDX"
	version      = 1
	digestBLAKE3 = 1 // the first 16 bytes of BLAKE3

	tableAlign = 64
	// maxEntries: entries are numbered with 32 bits.
	maxEntries = 1<<32 - 1
	// maxFanoutBits bounds the fanout table to 64 MiB.
	maxFanoutBits = 24
	// bucketSize is how many entries share a prefix of the fanout table.
	bucketSize = 16
)

// header is the decoded header and where the tables lie, checked.
type header struct {
	layerID    layer.ID
	layerSize  int64
	entries    uint64
	runs       uint64
	fanoutBits uint32
	filterRows uint32
	stamp      layer.Stamp
	bodySum    [16]byte

	digests, runTable, fanout, order, filter, end uint64 // offsets
}

// place computes where the tables lie.
func (h *header) place() {
	align := func(n uint64) uint64 { return (n + tableAlign - 1) &^ (tableAlign - 1) }
	h.digests = headerSize
	h.runTable = align(h.digests + 16*h.entries)
	h.fanout = align(h.runTable + 8*h.runs)
	h.order = align(h.fanout + 4*(1<<h.fanoutBits+1))
	h.filter = align(h.order + 4*h.entries)
	h.end = h.filter + filterRowSize*uint64(h.filterRows)
}

// encode writes the header's bytes.
func (h *header) encode() []byte {
	b := make([]byte, headerSize)
	le := binary.LittleEndian
	copy(b[offMagic:], magic)
	le.PutUint32(b[offVersion:], version)
	le.PutUint32(b[offHeaderSize:], headerSize)
	le.PutUint32(b[offBlockSize:], layer.BlockSize)
	le.PutUint32(b[offDigestKind:], digestBLAKE3)
	copy(b[offLayerID:], h.layerID[:])
	le.PutUint64(b[offLayerSize:], uint64(h.layerSize))
	le.PutUint64(b[offEntries:], h.entries)
	le.PutUint64(b[offRuns:], h.runs)
	le.PutUint32(b[offFanoutBits:], h.fanoutBits)
	le.PutUint32(b[offFilterRows:], h.filterRows)
	putStamp(b[offStamp:], h.stamp)
	le.PutUint64(b[offFileSize:], h.end)
	copy(b[offBodySum:], h.bodySum[:])
	le.PutUint64(b[offHeaderSum:], xxh3.Hash(b[:offHeaderSum]))
	return b
}

// stampSize is the size of an encoded stamp.
const stampSize = 40

func putStamp(b []byte, s layer.Stamp) {
	for i, v := range []uint64{uint64(s.Size), uint64(s.Mtime), uint64(s.Ctime), s.Device, s.Inode} {
		binary.LittleEndian.PutUint64(b[8*i:], v)
	}
}

func getStamp(b []byte) layer.Stamp {
	word := func(i int) uint64 { return binary.LittleEndian.Uint64(b[8*i:]) }
	return layer.Stamp{Size: int64(word(0)), Mtime: int64(word(1)), Ctime: int64(word(2)), Device: word(3), Inode: word(4)}
}

// formatError says what is wrong with an index.
func formatError(format string, args ...any) error {
	return fmt.Errorf("%w: %s", ErrFormat, fmt.Sprintf(format, args...))
}

// decodeHeader checks everything that the header says against itself and
// against the size of the file.
func decodeHeader(b []byte, fileSize uint64) (*header, error) {
	if len(b) < headerSize {
		return nil, formatError("%d bytes are too few", len(b))
	}
	le := binary.LittleEndian
	if string(b[:len(magic)]) != magic {
		return nil, formatError("it does not begin with %s", magic)
	}
	if v := le.Uint32(b[offVersion:]); v != version {
		return nil, formatError("version %d, this program reads %d", v, version)
	}
	if le.Uint64(b[offHeaderSum:]) != xxh3.Hash(b[:offHeaderSum]) {
		return nil, formatError("the header was altered")
	}
	if !bytes.Equal(b[headerUsed:headerSize], make([]byte, headerSize-headerUsed)) {
		return nil, formatError("the header was altered")
	}
	if hs, bs, kind := le.Uint32(b[offHeaderSize:]), le.Uint32(b[offBlockSize:]), le.Uint32(b[offDigestKind:]); hs != headerSize || bs != layer.BlockSize || kind != digestBLAKE3 {
		return nil, formatError("header of %d bytes, blocks of %d bytes, digest %d", hs, bs, kind)
	}
	h := &header{
		layerSize:  int64(le.Uint64(b[offLayerSize:])),
		entries:    le.Uint64(b[offEntries:]),
		runs:       le.Uint64(b[offRuns:]),
		fanoutBits: le.Uint32(b[offFanoutBits:]),
		filterRows: le.Uint32(b[offFilterRows:]),
		stamp:      getStamp(b[offStamp:]),
	}
	copy(h.layerID[:], b[offLayerID:])
	copy(h.bodySum[:], b[offBodySum:])
	switch {
	case h.layerSize < 0 || h.layerSize/layer.BlockSize > maxEntries:
		return nil, formatError("layer of %d bytes", h.layerSize)
	case h.entries > uint64(h.layerSize)/layer.BlockSize:
		return nil, formatError("%d entries for a layer of %d bytes", h.entries, h.layerSize)
	case h.runs > h.entries || h.runs == 0 && h.entries > 0:
		return nil, formatError("%d runs of %d entries", h.runs, h.entries)
	case h.fanoutBits > maxFanoutBits || h.filterRows == 0:
		return nil, formatError("fanout of %d bits, filter of %d rows", h.fanoutBits, h.filterRows)
	case h.layerID.Kind() != layer.Content:
		return nil, formatError("layer identity %s", h.layerID)
	}
	if h.place(); h.end != fileSize || le.Uint64(b[offFileSize:]) != fileSize {
		return nil, formatError("it has %d bytes and should have %d: truncated", fileSize, h.end)
	}
	return h, nil
}

// fanoutBitsFor returns the prefix length that gives buckets of bucketSize.
func fanoutBitsFor(entries uint64) uint32 {
	bits := uint32(0)
	for entries>>bits > bucketSize && bits < maxFanoutBits {
		bits++
	}
	return bits
}

// prefix returns the first bits of a digest.
func prefix(d *layer.Digest, bits uint32) uint64 {
	return uint64(binary.BigEndian.Uint32(d[:])) >> (32 - bits)
}
