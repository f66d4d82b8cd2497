package memory

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// userfault is the one userfaultfd of a VM, opened WP_ASYNC: the kernel
// resolves write-protection faults itself and only records them. One VMA has at
// most one userfaultfd, and async is a property of the descriptor, so whatever
// else needs userfaultfd on guest memory shares this one.
type userfault struct{ fd int }

// From include/uapi/linux/userfaultfd.h.
const (
	userfaultDevice = "/dev/userfaultfd"

	uffdUserModeOnly = 1
	uffdAPIVersion   = 0xaa

	uffdFeatureWPAsync  = 1 << 15
	uffdRegisterModeWP  = 1 << 1
	uffdWriteProtectOff = 0

	userfaultfdIOCNew  = 0xaa00     // _IO(0xAA, 0x00)
	uffdioAPI          = 0xc018aa3f // _IOWR(0xAA, 0x3F, struct uffdio_api)
	uffdioRegister     = 0xc020aa00 // _IOWR(0xAA, 0x00, struct uffdio_register)
	uffdioWriteProtect = 0xc018aa06 // _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
)

// uffdAPI mirrors struct uffdio_api.
type uffdAPI struct{ API, Features, Ioctls uint64 }

// uffdRegister mirrors struct uffdio_register.
type uffdRegister struct{ Start, Len, Mode, Ioctls uint64 }

// uffdWriteProtect mirrors struct uffdio_writeprotect.
type uffdWriteProtect struct{ Start, Len, Mode uint64 }

// openUserfault opens a userfaultfd and enables WP_ASYNC on it. The device and
// the privileged system call are tried first, since only descriptors made by
// them can later serve faults that KVM takes; for WP_ASYNC alone user mode is
// enough.
func openUserfault() (*userfault, error) {
	fd, err := newUserfaultFD()
	if err != nil {
		return nil, fmt.Errorf("userfaultfd: %w", err)
	}
	api := uffdAPI{API: uffdAPIVersion, Features: uffdFeatureWPAsync}
	if err := ioctlUserfault(fd, uffdioAPI, unsafe.Pointer(&api)); err != nil {
		_ = unix.Close(fd)
		return nil, fmt.Errorf("UFFDIO_API with WP_ASYNC: %w", err)
	}
	return &userfault{fd: fd}, nil
}

func newUserfaultFD() (int, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	if dev, err := unix.Open(userfaultDevice, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), userfaultfdIOCNew, flags)
		_ = unix.Close(dev)
		if errno == 0 {
			return int(fd), nil
		}
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	if errno == unix.EPERM {
		fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, flags|uffdUserModeOnly, 0, 0)
	}
	if errno != 0 {
		return -1, errno
	}
	return int(fd), nil
}

// register makes [start, start+n) trackable. Doing so again is allowed, and
// needed after every mmap with MAP_FIXED.
func (u *userfault) register(start, n uintptr) error {
	reg := uffdRegister{Start: uint64(start), Len: uint64(n), Mode: uffdRegisterModeWP}
	if err := ioctlUserfault(u.fd, uffdioRegister, unsafe.Pointer(&reg)); err != nil {
		return fmt.Errorf("UFFDIO_REGISTER: %w", err)
	}
	return nil
}

// unprotect disarms [start, start+n): the pages count as written, and huge
// pages covered whole stay huge.
func (u *userfault) unprotect(start, n uintptr) error {
	wp := uffdWriteProtect{Start: uint64(start), Len: uint64(n), Mode: uffdWriteProtectOff}
	err := ioctlUserfault(u.fd, uffdioWriteProtect, unsafe.Pointer(&wp))
	if errors.Is(err, unix.ENOENT) {
		err = ErrNotRegistered
	}
	if err != nil {
		return fmt.Errorf("UFFDIO_WRITEPROTECT: %w", err)
	}
	return nil
}

// close closes the descriptor, which unregisters and disarms everything.
func (u *userfault) close() error { return unix.Close(u.fd) }

// ioctlUserfault issues a call, again while the kernel says that the address
// space is just being changed.
func ioctlUserfault(fd int, request uintptr, arg unsafe.Pointer) error {
	for {
		// SAFETY: the conversion stands in the call, so that arg stays alive
		// and in place until the kernel is done with it.
		_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		switch errno {
		case 0:
			return nil
		case unix.EINTR:
		case unix.EAGAIN:
			runtime.Gosched()
		default:
			return errno
		}
	}
}
