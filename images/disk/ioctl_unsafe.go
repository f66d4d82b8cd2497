package disk

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// discardDevice is the BLKDISCARD ioctl: the range as two 64-bit numbers.
func discardDevice(fd int, offset, n uint64) error {
	span := [2]uint64{offset, n}
	for {
		// SAFETY: BLKDISCARD reads 16 bytes from the pointer during the call.
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.BLKDISCARD, uintptr(unsafe.Pointer(&span)))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
			continue
		}
		return errno
	}
}
