package net

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// maxVector is the kernel's IOV_MAX.
const maxVector = 1024

// vector is the storage for one system call's struct iovec array, so that the
// frame path allocates nothing.
type vector struct {
	iov [maxVector]unix.Iovec
}

// fill points the array at the buffers.
func (v *vector) fill(buffers [][]byte) ([]unix.Iovec, error) {
	if len(buffers) > maxVector {
		return nil, unix.EINVAL
	}
	n := 0
	for _, b := range buffers {
		if len(b) == 0 {
			continue
		}
		v.iov[n].Base = &b[0]
		v.iov[n].SetLen(len(b))
		n++
	}
	if n == 0 {
		return nil, unix.EINVAL
	}
	return v.iov[:n], nil
}

// readv reads into the buffers.
func (v *vector) readv(fd int, to [][]byte) (int, error) {
	return v.call(unix.SYS_READV, fd, to)
}

// writev writes the buffers.
func (v *vector) writev(fd int, from [][]byte) (int, error) {
	return v.call(unix.SYS_WRITEV, fd, from)
}

func (v *vector) call(number uintptr, fd int, buffers [][]byte) (int, error) {
	iov, err := v.fill(buffers)
	if err != nil {
		return 0, err
	}
	// SAFETY: iov is part of v and holds at least one element. Its bases are
	// typed pointers into slices that the caller keeps alive during the call,
	// of guest memory, which is mapped until the device was stopped, or of the
	// Go heap.
	n, _, errno := unix.Syscall(number, uintptr(fd), uintptr(unsafe.Pointer(&iov[0])), uintptr(len(iov)))
	if errno != 0 {
		return 0, errno
	}
	return int(n), nil
}
