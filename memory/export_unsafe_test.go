package memory

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// Replace maps fresh memory, or a private view of a file, over r, as a remap
// does.
func Replace(s *Space, r Range, fd int) error {
	p, err := s.locate(r)
	if err != nil {
		return err
	}
	flags := unix.MAP_FIXED | unix.MAP_PRIVATE
	if fd < 0 {
		flags |= unix.MAP_ANONYMOUS
	}
	off := uint64(r.Start - p.region.Start)
	// SAFETY: the range belongs to the Space and stays mapped.
	_, err = unix.MmapPtr(fd, 0, unsafe.Pointer(&p.region.mem[off]), uintptr(r.Size), unix.PROT_READ|unix.PROT_WRITE, flags)
	return err
}

// Raw returns guest memory without fetching what is missing: for the kernel to
// touch.
func Raw(s *Space, r Range) []byte {
	p, err := s.locate(r)
	if err != nil {
		panic(err)
	}
	return p.region.part(r)
}
