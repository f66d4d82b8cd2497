package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// Request types (virtio 1.2 5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeGetID       = 8
	typeDiscard     = 11
	typeWriteZeroes = 13
)

// Request status, the last byte that the device writes.
const (
	statusOK          = 0
	statusIOError     = 1
	statusUnsupported = 2
)

// Sizes of a request's parts, in bytes.
const (
	headerSize  = 16 // le32 type, le32 reserved, le64 sector
	statusSize  = 1
	serialSize  = 20
	segmentSize = 16 // le64 sector, le32 sectors, le32 flags
	sectorSize  = 512
)

// unmapFlag of a write-zeroes segment lets the device give the storage back.
const unmapFlag = 1

// geometry is what requests are checked against.
type geometry struct {
	size      int64 // bytes
	blockSize int64
	readOnly  bool
	features  uint64 // negotiated
	maxErase  uint32 // sectors of one discard or write-zeroes
}

// request is a parsed request: plain numbers inside the disk.
type request struct {
	kind   uint32
	offset int64 // bytes
	length int64 // bytes of data, or of the range to erase
	unmap  bool
}

// errNoStatus is a chain without room for a status: the device cannot answer,
// so the driver has broken the protocol.
var errNoStatus = errors.New("block request without room for a header and a status")

// parse reads a request from the first bytes of the readable part of its
// chain, of which head is a copy: the header, and for discard and write-zeroes
// the segment. It returns the status to answer with when there is nothing to
// do, or statusOK. The request does not depend on memory that the guest can
// still change.
func parse(head []byte, readable, writable uint64, g *geometry) (r request, status byte, err error) {
	if readable < headerSize || len(head) < headerSize || writable < statusSize {
		return request{}, 0, errNoStatus
	}
	r.kind = binary.LittleEndian.Uint32(head)
	sector := binary.LittleEndian.Uint64(head[8:])
	switch r.kind {
	case typeIn:
		status = r.place(sector, writable-statusSize, g)
	case typeOut:
		status = r.place(sector, readable-headerSize, g)
		if g.readOnly {
			status = statusIOError
		}
	case typeFlush:
		status = statusOK
	case typeGetID:
		r.length = int64(min(writable-statusSize, serialSize))
	case typeDiscard, typeWriteZeroes:
		status = r.parseErase(head, readable, g)
	default:
		status = statusUnsupported
	}
	return r, status, nil
}

// place puts a read or write of n bytes at a sector.
func (r *request) place(sector, n uint64, g *geometry) byte {
	size := uint64(g.size)
	if sector > size/sectorSize {
		return statusIOError
	}
	offset := sector * sectorSize
	if n > size-offset || offset%uint64(g.blockSize) != 0 || n%uint64(g.blockSize) != 0 {
		return statusIOError
	}
	r.offset, r.length = int64(offset), int64(n)
	return statusOK
}

// parseErase reads the one segment of a discard or write-zeroes; the device
// says that it takes one at most.
func (r *request) parseErase(head []byte, readable uint64, g *geometry) byte {
	feature := uint64(FeatureDiscard)
	if r.kind == typeWriteZeroes {
		feature = FeatureWriteZeroes
	}
	switch {
	case g.features&feature == 0:
		return statusUnsupported
	case g.readOnly, readable != headerSize+segmentSize, len(head) < headerSize+segmentSize:
		return statusIOError
	}
	segment := head[headerSize:]
	sectors := binary.LittleEndian.Uint32(segment[8:])
	flags := binary.LittleEndian.Uint32(segment[12:])
	if flags&^unmapFlag != 0 || r.kind == typeDiscard && flags != 0 {
		return statusUnsupported // virtio 1.2 5.2.6.2
	}
	if sectors == 0 || sectors > g.maxErase {
		return statusIOError
	}
	r.unmap = flags&unmapFlag != 0
	return r.place(binary.LittleEndian.Uint64(segment), uint64(sectors)*sectorSize, g)
}

// String names the request for logs.
func (r request) String() string {
	name := map[uint32]string{
		typeIn: "read", typeOut: "write", typeFlush: "flush", typeGetID: "get-id",
		typeDiscard: "discard", typeWriteZeroes: "write-zeroes",
	}[r.kind]
	return fmt.Sprintf("%s of %d bytes at %d", name, r.length, r.offset)
}
