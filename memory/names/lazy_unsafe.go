package names

import (
	"errors"
	"unsafe"

	"golang.org/x/sys/unix"
)

// lazy is memory for arrays as long as guest memory has pages. The kernel makes
// it when it is touched, so that a table costs what is named and not what could
// be, and the garbage collector does not count it: it would let garbage grow to
// the same size. The zero value is ready.
type lazy struct{ mappings [][]byte }

// lazyFrom is the size from which on an array is mapped, in bytes.
const lazyFrom = 256 << 10

// zeroed returns n zeros, valid until the memory is closed.
func zeroed[T uint32 | uint64](l *lazy, n uint64) []T {
	var t T
	size := n * uint64(unsafe.Sizeof(t))
	if size < lazyFrom {
		return make([]T, n)
	}
	m, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return make([]T, n) // as good, but for the collector
	}
	l.mappings = append(l.mappings, m)
	// SAFETY: the mapping is that long, page-aligned, and lives until close.
	return unsafe.Slice((*T)(unsafe.Pointer(&m[0])), n)
}

// close gives the memory back.
func (l *lazy) close() error {
	var errs []error
	for _, m := range l.mappings {
		errs = append(errs, unix.Munmap(m))
	}
	l.mappings = nil
	return errors.Join(errs...)
}
