package disk

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// Resize gives an image another size: a file grows by zeros, or loses what is
// behind its new end. A block device has the size that the host gives it; up to
// that any size will do. What a user can get wrong is an [*Error].
func (r *Raw) Resize(size int64) error {
	switch {
	case r.options.ReadOnly:
		return &Error{Path: r.path, Reason: "is open read-only", Cure: "start the machine with a disk that it may write"}
	case size <= 0 || size%int64(r.blockSize) != 0:
		return &Error{
			Path: r.path, Reason: fmt.Sprintf("cannot have a size of %d bytes", size),
			Cure: fmt.Sprintf("use a multiple of %d", r.blockSize),
		}
	}
	resize := r.resizeFile
	if r.block {
		resize = r.resizeDevice
	}
	if err := resize(size); err != nil {
		return err
	}
	r.size.Store(size)
	return nil
}

// resizeFile changes the file's length, unless another process relies on it.
func (r *Raw) resizeFile(size int64) error {
	const byteOfResize = permBase + 3 // of permResize
	if err := setLock(r.fd, unix.F_RDLCK, byteOfResize, 1); err != nil {
		return lockError(r.path, r.fd, r.options, err)
	}
	// Others may rely on the length again afterwards.
	defer func() { _ = setLock(r.fd, unix.F_UNLCK, byteOfResize, 1) }()
	if err := checkLocks(r.fd, permResize, 0); err != nil {
		return lockError(r.path, r.fd, r.options, err)
	}
	for {
		err := unix.Ftruncate(r.fd, size)
		switch {
		case err == nil:
			return nil
		case !errors.Is(err, unix.EINTR):
			return &Error{Path: r.path, Err: err, Reason: fmt.Sprintf("cannot be made %d bytes long: %v", size, err), Cure: "check the file system's limits"}
		}
	}
}

// resizeDevice checks that the device is long enough.
func (r *Raw) resizeDevice(size int64) error {
	has, err := unix.Seek(r.fd, 0, unix.SEEK_END)
	if err != nil {
		return &Error{Path: r.path, Err: err, Reason: "its size cannot be found: " + err.Error(), Cure: "check the device"}
	}
	if size > has {
		return &Error{Path: r.path, Reason: fmt.Sprintf("is %d bytes long", has), Cure: "make the device larger first"}
	}
	return nil
}
