package memory

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// userfault is the one userfaultfd of a VM, opened WP_ASYNC: the kernel
// resolves write-protection faults itself and only records them, while it asks
// for pages that are missing. One VMA has at most one userfaultfd, and async is a
// property of the descriptor, so that both purposes share this one.
type userfault struct {
	fd int
	// kernel says that it serves faults that the kernel takes, for KVM or for
	// I/O, and not only those of the process.
	kernel bool
}

// From include/uapi/linux/userfaultfd.h.
const (
	userfaultDevice = "/dev/userfaultfd"

	uffdUserModeOnly = 1
	uffdAPIVersion   = 0xaa

	uffdFeatureWPAsync      = 1 << 15
	uffdRegisterModeMissing = 1 << 0
	uffdRegisterModeWP      = 1 << 1
	uffdWriteProtectOff     = 0
	uffdCopyModeWP          = 1 << 1

	userfaultfdIOCNew  = 0xaa00     // _IO(0xAA, 0x00)
	uffdioAPI          = 0xc018aa3f // _IOWR(0xAA, 0x3F, struct uffdio_api)
	uffdioRegister     = 0xc020aa00 // _IOWR(0xAA, 0x00, struct uffdio_register)
	uffdioUnregister   = 0x8010aa01 // _IOR(0xAA, 0x01, struct uffdio_range)
	uffdioWake         = 0x8010aa02 // _IOR(0xAA, 0x02, struct uffdio_range)
	uffdioCopy         = 0xc028aa03 // _IOWR(0xAA, 0x03, struct uffdio_copy)
	uffdioZeropage     = 0xc020aa04 // _IOWR(0xAA, 0x04, struct uffdio_zeropage)
	uffdioWriteProtect = 0xc018aa06 // _IOWR(0xAA, 0x06, struct uffdio_writeprotect)
)

// uffdAPI mirrors struct uffdio_api.
type uffdAPI struct{ API, Features, Ioctls uint64 }

// uffdRange mirrors struct uffdio_range.
type uffdRange struct{ Start, Len uint64 }

// uffdRegister mirrors struct uffdio_register.
type uffdRegister struct{ Start, Len, Mode, Ioctls uint64 }

// uffdWriteProtect mirrors struct uffdio_writeprotect.
type uffdWriteProtect struct{ Start, Len, Mode uint64 }

// uffdCopy mirrors struct uffdio_copy.
type uffdCopy struct {
	Dst, Src, Len, Mode uint64
	Copy                int64
}

// uffdZeropage mirrors struct uffdio_zeropage.
type uffdZeropage struct {
	Start, Len, Mode uint64
	Zeropage         int64
}

// openUserfault opens a userfaultfd and enables WP_ASYNC on it. The device and
// the privileged system call are tried first, since only descriptors made by
// them can serve faults that KVM takes; for WP_ASYNC alone user mode is enough.
func openUserfault() (*userfault, error) {
	u, err := newUserfault()
	if err != nil {
		return nil, fmt.Errorf("userfaultfd: %w", err)
	}
	api := uffdAPI{API: uffdAPIVersion, Features: uffdFeatureWPAsync}
	if err := ioctlUserfault(u.fd, uffdioAPI, unsafe.Pointer(&api)); err != nil {
		_ = unix.Close(u.fd)
		return nil, fmt.Errorf("UFFDIO_API with WP_ASYNC: %w", err)
	}
	return u, nil
}

func newUserfault() (*userfault, error) {
	const flags = unix.O_CLOEXEC | unix.O_NONBLOCK
	if dev, err := unix.Open(userfaultDevice, unix.O_RDWR|unix.O_CLOEXEC, 0); err == nil {
		fd, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(dev), userfaultfdIOCNew, flags)
		_ = unix.Close(dev)
		if errno == 0 {
			return &userfault{fd: int(fd), kernel: true}, nil
		}
	}
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, flags, 0, 0)
	kernel := errno == 0
	if errno == unix.EPERM {
		fd, _, errno = unix.Syscall(unix.SYS_USERFAULTFD, flags|uffdUserModeOnly, 0, 0)
	}
	if errno != 0 {
		return nil, errno
	}
	return &userfault{fd: int(fd), kernel: kernel}, nil
}

// register asks for what mode says in [start, start+n). A VMA that has all of
// the mode already stays as it is; another has this mode only from then on. So it
// is needed after every mmap with MAP_FIXED, and modes are added all at once.
func (u *userfault) register(start, n uintptr, mode uint64) error {
	reg := uffdRegister{Start: uint64(start), Len: uint64(n), Mode: mode}
	if err := ioctlUserfault(u.fd, uffdioRegister, unsafe.Pointer(&reg)); err != nil {
		return fmt.Errorf("UFFDIO_REGISTER: %w", err)
	}
	return nil
}

// unregister forgets [start, start+n), disarms it and wakes who waits there.
func (u *userfault) unregister(start, n uintptr) error {
	r := uffdRange{Start: uint64(start), Len: uint64(n)}
	if err := ioctlUserfault(u.fd, uffdioUnregister, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("UFFDIO_UNREGISTER: %w", err)
	}
	return nil
}

// wake lets those who wait for pages of [start, start+n) try again.
func (u *userfault) wake(start, n uintptr) error {
	r := uffdRange{Start: uint64(start), Len: uint64(n)}
	if err := ioctlUserfault(u.fd, uffdioWake, unsafe.Pointer(&r)); err != nil {
		return fmt.Errorf("UFFDIO_WAKE: %w", err)
	}
	return nil
}

// copy makes the holes at dst pages with the bytes of src, armed or not, and
// wakes who waits for them. It returns how many bytes that was done for: with
// EEXIST, there is a page behind these.
func (u *userfault) copy(dst uintptr, src []byte, armed bool) (done int, err error) {
	mode := uint64(0)
	if armed {
		mode = uffdCopyModeWP
	}
	for done < len(src) {
		// SAFETY: src is on the Go heap, which does not move, and is kept alive
		// below.
		arg := uffdCopy{Dst: uint64(dst) + uint64(done), Src: uint64(uintptr(unsafe.Pointer(&src[done]))), Len: uint64(len(src) - done), Mode: mode}
		errno := ioctlOnce(u.fd, uffdioCopy, unsafe.Pointer(&arg))
		runtime.KeepAlive(src)
		switch errno {
		case 0:
			return len(src), nil
		case unix.EAGAIN, unix.EINTR:
			done += int(max(arg.Copy, 0))
		default:
			return done, errno
		}
	}
	return done, nil
}

// zero makes the holes of [start, start+n) the page of zeros, and wakes who
// waits for them. It returns as copy does.
func (u *userfault) zero(start, n uintptr) (done uintptr, err error) {
	for done < n {
		arg := uffdZeropage{Start: uint64(start + done), Len: uint64(n - done)}
		errno := ioctlOnce(u.fd, uffdioZeropage, unsafe.Pointer(&arg))
		switch errno {
		case 0:
			return n, nil
		case unix.EAGAIN, unix.EINTR:
			done += uintptr(max(arg.Zeropage, 0))
		default:
			return done, errno
		}
	}
	return done, nil
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
		switch errno := ioctlOnce(fd, request, arg); errno {
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

func ioctlOnce(fd int, request uintptr, arg unsafe.Pointer) unix.Errno {
	// SAFETY: the conversion stands in the call, so that arg stays alive and in
	// place until the kernel is done with it.
	_, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
	return errno
}
