package blk

import "ditto.vm/devices/virtio"

// IO is one read or write between the disk and guest memory.
type IO struct {
	// Offset is where it begins on the disk, in bytes.
	Offset int64
	// Buffers are guest memory, in the order of the bytes on the disk. A
	// page may stand in it twice.
	Buffers []virtio.Buffer
	// Note belongs to the observer, from Before to After.
	Note uint64
}

// Observer hears of every read, write and erasure, from the queues' workers,
// several at once. It must not block, and keeps nothing of an IO after the
// call. Each Before is followed by one After; err is not nil when it is not
// known what was transferred. The orders are those that make a page's name
// safe:
//
//	read:  BeforeRead (drop the names of the pages), disk, memory reported
//	       as written, AfterRead (record), used ring
//	write: BeforeWrite (note generations of pages and blocks), disk,
//	       AfterWrite (record if neither moved), used ring
//	erase: BeforeErase (drop the names of the blocks), disk, AfterErase,
//	       used ring
//	resize: the last request completes, Resize (drop the names of blocks
//	       beyond the end), the first request of the new size
type Observer interface {
	BeforeRead(io *IO)
	AfterRead(io *IO, err error)
	BeforeWrite(io *IO)
	AfterWrite(io *IO, err error)
	// BeforeErase and AfterErase surround a discard or write-zeroes of
	// [offset, offset+n).
	BeforeErase(offset, n int64)
	AfterErase(offset, n int64, err error)
	// Resize says that the disk ends at size from now on. Nothing is in
	// flight.
	Resize(size int64)
}
