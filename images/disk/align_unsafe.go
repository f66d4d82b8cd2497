package disk

import "unsafe"

// misaligned reports that O_DIRECT cannot use bufs as they are.
func (r *Raw) misaligned(bufs [][]byte) bool {
	if r.memAlign <= 1 {
		return false
	}
	mask := uintptr(r.memAlign - 1)
	for _, b := range bufs {
		// SAFETY: the address is only looked at, never used as a pointer.
		if len(b) > 0 && (uintptr(unsafe.Pointer(&b[0]))|uintptr(len(b)))&mask != 0 {
			return true
		}
	}
	return false
}

// buffer returns n bytes aligned for O_DIRECT.
func (r *Raw) buffer(n int) []byte {
	if n == 0 {
		return nil
	}
	b := make([]byte, n+r.memAlign-1)
	// SAFETY: the address is only looked at; Go's heap does not move.
	skip := int(-uintptr(unsafe.Pointer(&b[0])) & uintptr(r.memAlign-1))
	return b[skip : skip+n : skip+n]
}
