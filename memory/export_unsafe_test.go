package memory

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Replace maps fresh anonymous memory over r, as a remap does.
func Replace(s *Space, r Range) error {
	p, err := s.locate(r)
	if err != nil {
		return err
	}
	off := uint64(r.Start - p.region.Start)
	// SAFETY: the range belongs to the Space and stays mapped.
	_, err = unix.MmapPtr(-1, 0, unsafe.Pointer(&p.region.mem[off]), uintptr(r.Size),
		unix.PROT_READ|unix.PROT_WRITE, unix.MAP_FIXED|unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	return err
}
