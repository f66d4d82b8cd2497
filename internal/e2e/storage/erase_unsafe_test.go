package storage

import (
	"math"
	"os"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// trimRange mirrors struct fstrim_range of linux/fs.h.
type trimRange struct{ start, length, minLength uint64 }

// trim discards what is free in the file system at dir, and returns how many
// bytes that was (ioctl FITRIM).
func trim(dir string) (uint64, error) {
	f, err := os.Open(dir)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	const fitrim = 0xc0185879
	r := trimRange{length: math.MaxUint64}
	// SAFETY: the kernel reads and writes the three words of r during the call.
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrim, uintptr(unsafe.Pointer(&r))); errno != 0 {
		return 0, errno
	}
	return r.length, nil
}

// discard discards [start, start+n) of a block device (ioctl BLKDISCARD).
func discard(f *os.File, start, n uint64) error {
	const blkdiscard = 0x1277
	r := [2]uint64{start, n}
	// SAFETY: the kernel reads the two words of r during the call.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), blkdiscard, uintptr(unsafe.Pointer(&r)))
	runtime.KeepAlive(f)
	if errno != 0 {
		return errno
	}
	return nil
}
