package kvm

import (
	"fmt"
	"unsafe"

	gokvm "github.com/bobuhiro11/gokvm/kvm"
	"golang.org/x/sys/unix"
)

// Ioctl numbers that gokvm does not name (include/uapi/linux/kvm.h).
const (
	nrGetVCPUMmapSize    = 0x04
	nrGetSupportedCPUID  = 0x05
	nrGetMSRIndexList    = 0x02
	nrCreateVCPU         = 0x41
	nrGetDirtyLog        = 0x42
	nrIRQLine            = 0x61
	nrSetGSIRouting      = 0x6a
	nrIRQFD              = 0x76
	nrCreatePIT2         = 0x77
	nrSetBootCPUID       = 0x78
	nrIOEventFD          = 0x79
	nrSetIdentityMapAddr = 0x48
	nrRun                = 0x80
	nrGetMSRs            = 0x88
	nrSetMSRs            = 0x89
	nrGetFPU             = 0x8c
	nrSetFPU             = 0x8d
	nrSetCPUID2          = 0x90
	nrGetCPUID2          = 0x91
	nrNMI                = 0x9a
	nrEnableCap          = 0xa3
	nrGetXSAVE           = 0xa4
	nrSetXSAVE           = 0xa5
	nrKVMClockCtrl       = 0xad
	nrClearDirtyLog      = 0xc0
	nrResetDirtyRings    = 0xc7
	nrSetDeviceAttr      = 0xe1
	nrGetDeviceAttr      = 0xe2
	nrGetXSAVE2          = 0xcf
	nrGetStatsFD         = 0xce
)

// OpError is a failed KVM call.
type OpError struct {
	Op  string // the ioctl, as the kernel names it
	Err error
}

// Error implements error.
func (e *OpError) Error() string { return e.Op + ": " + e.Err.Error() }

// Unwrap returns the errno.
func (e *OpError) Unwrap() error { return e.Err }

func opError(op string, err error) error {
	if err == nil {
		return nil
	}
	return &OpError{Op: op, Err: err}
}

// ioctl issues a call with an integer argument, again after EINTR.
func ioctl(op string, fd int, request, arg uintptr) (int, error) {
	for {
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return int(r), &OpError{Op: op, Err: errno}
		}
		return int(r), nil
	}
}

// ioctlPtr issues a call whose argument points to a structure.
func ioctlPtr(op string, fd int, request uintptr, arg unsafe.Pointer) (int, error) {
	for {
		// SAFETY: the conversion stands in the call, so that arg stays alive
		// and in place until the kernel is done with it.
		r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(arg))
		if errno == unix.EINTR {
			continue
		}
		if errno != 0 {
			return int(r), &OpError{Op: op, Err: errno}
		}
		return int(r), nil
	}
}

// ior, iow and iowr encode request numbers for a structure of type T.
func ior[T any](nr uintptr) uintptr  { var v T; return gokvm.IIOR(nr, unsafe.Sizeof(v)) }
func iow[T any](nr uintptr) uintptr  { var v T; return gokvm.IIOW(nr, unsafe.Sizeof(v)) }
func iowr[T any](nr uintptr) uintptr { var v T; return gokvm.IIOWR(nr, unsafe.Sizeof(v)) }

// get fills a structure by an _IOR call.
func get[T any](op string, fd int, nr uintptr) (T, error) {
	var v T
	_, err := ioctlPtr(op, fd, ior[T](nr), unsafe.Pointer(&v))
	return v, err
}

// set passes a structure by an _IOW call.
func set[T any](op string, fd int, nr uintptr, v *T) error {
	_, err := ioctlPtr(op, fd, iow[T](nr), unsafe.Pointer(v))
	return err
}

// variable is a header of two 32-bit words, the first of them a count, followed
// by that many entries: the shape of kvm_cpuid2, kvm_msrs and kvm_irq_routing.
type variable[T any] struct {
	words []uint64 // 8-byte aligned storage
	size  uintptr  // of one entry
}

func newVariable[T any](capacity int) variable[T] {
	var v T
	size := unsafe.Sizeof(v)
	return variable[T]{words: make([]uint64, 1+(uintptr(capacity)*size+7)/8), size: size}
}

func (v variable[T]) count() int {
	// SAFETY: words has at least one element.
	return int(*(*uint32)(unsafe.Pointer(&v.words[0])))
}

func (v variable[T]) setCount(n int) {
	*(*uint32)(unsafe.Pointer(&v.words[0])) = uint32(n)
}

// entries returns the first n entries in place.
func (v variable[T]) entries(n int) []T {
	if n == 0 {
		return nil
	}
	if uintptr(n)*v.size > uintptr(len(v.words)-1)*8 {
		panic(fmt.Sprintf("kvm: %d entries do not fit the buffer", n))
	}
	// SAFETY: the storage behind the header holds n entries, checked above.
	return unsafe.Slice((*T)(unsafe.Pointer(&v.words[1])), n)
}

func (v variable[T]) pointer() unsafe.Pointer { return unsafe.Pointer(&v.words[0]) }

// headerRequest encodes a request whose size is that of the header alone.
func headerRequest(dir func(nr, size uintptr) uintptr, nr uintptr) uintptr { return dir(nr, 8) }
