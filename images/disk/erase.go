package disk

import (
	"errors"

	"golang.org/x/sys/unix"
)

// zeroChunk is how much is written at once where the file system cannot zero
// a range by itself.
const zeroChunk = 1 << 20

// Discard implements [Image]. A file system or device that cannot discard is
// no error: the content stays.
func (r *Raw) Discard(offset, n int64) error {
	if r.noPunch.Load() {
		return nil
	}
	var err error
	if r.block {
		err = discardDevice(r.fd, uint64(offset), uint64(n))
	} else {
		err = r.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, n)
	}
	if unsupported(err) {
		r.noPunch.Store(true)
		return nil
	}
	return err
}

// WriteZeroes implements [Image]: by a hole where that is allowed, by marking
// the range as zero, or by writing zeros.
func (r *Raw) WriteZeroes(offset, n int64, unmap bool) error {
	if unmap && !r.noPunch.Load() {
		// On a block device this is a zeroing discard, or not supported.
		err := r.fallocate(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, offset, n)
		if !unsupported(err) {
			return r.stable(err)
		}
		if !r.block {
			r.noPunch.Store(true)
		}
	}
	if !r.noZeroRange.Load() {
		err := r.fallocate(unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, offset, n)
		if !unsupported(err) {
			return r.stable(err)
		}
		r.noZeroRange.Store(true)
	}
	zeros := r.buffer(int(min(n, zeroChunk)))
	for n > 0 {
		k := min(n, int64(len(zeros)))
		if err := r.WriteAtv([][]byte{zeros[:k]}, offset); err != nil {
			return err
		}
		offset, n = offset+k, n-k
	}
	return nil
}

// stable flushes in writethrough mode, where every change is stable when it
// completes.
func (r *Raw) stable(err error) error {
	if err != nil || r.options.Cache != CacheWritethrough {
		return err
	}
	return r.Flush()
}

func (r *Raw) fallocate(mode uint32, offset, n int64) error {
	for {
		if err := unix.Fallocate(r.fd, mode, offset, n); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// unsupported tells "cannot" from "went wrong".
func unsupported(err error) bool {
	return errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOSYS) ||
		errors.Is(err, unix.ENOTTY) || errors.Is(err, unix.ENODEV)
}
