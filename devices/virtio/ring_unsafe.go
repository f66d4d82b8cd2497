package virtio

import (
	"sync/atomic"
	"unsafe"
)

// The driver runs on other CPUs while the device reads and writes the rings.
// The 16-bit indexes must be read and written whole and in order. On amd64,
// the only architecture ditto builds for, the CPU keeps loads in order and
// stores in order; not inlining keeps the compiler from moving them. Only a
// load after a store needs a fence.

// load16 reads the ring field at offset once.
//
//go:noinline
func load16(ring []byte, offset int) uint16 {
	b := ring[offset : offset+2 : offset+2]
	// SAFETY: b holds two bytes of guest RAM, which outlives the queue; the
	// rings are at least 2-aligned (checked by NewQueue) and so are offsets.
	return *(*uint16)(unsafe.Pointer(&b[0]))
}

// store16 writes the ring field at offset whole.
//
//go:noinline
func store16(ring []byte, offset int, value uint16) {
	b := ring[offset : offset+2 : offset+2]
	// SAFETY: as in load16.
	*(*uint16)(unsafe.Pointer(&b[0])) = value
}

// fence orders all earlier stores before all later loads.
func fence(word *atomic.Uint32) { word.Swap(0) }
