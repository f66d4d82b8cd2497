package virtiotest

import "unsafe"

// load16 reads a ring field whole, and is not moved by the compiler.
//
//go:noinline
func load16(b []byte) uint16 {
	_ = b[1]
	// SAFETY: b is at least two bytes of guest memory, checked above; ring
	// fields are 2-aligned.
	return *(*uint16)(unsafe.Pointer(&b[0]))
}

// store16 writes a ring field whole, and is not moved by the compiler.
//
//go:noinline
func store16(b []byte, value uint16) {
	_ = b[1]
	// SAFETY: as in load16.
	*(*uint16)(unsafe.Pointer(&b[0])) = value
}
