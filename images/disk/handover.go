package disk

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// ErrWritten is wrapped by the [Error] of a disk that somebody wrote while it was
// given up.
var ErrWritten = errors.New("disk was written by another")

// Release gives up the file's locks, so that somebody else can have it: what was
// written is stable, and nothing may be in flight, nor begin before
// [Raw.Reclaim]. The file stays open. Twice is once.
func (r *Raw) Release() error {
	if r.released {
		return nil
	}
	if !r.options.ReadOnly {
		if err := r.Flush(); err != nil {
			return fmt.Errorf("disk %s: %w", r.path, err)
		}
	}
	var err error
	if r.left, err = r.Stamp(); err != nil {
		return err
	}
	if err := setLock(r.fd, unix.F_UNLCK, 0, unsharedBase+permCount); err != nil {
		return fmt.Errorf("disk %s: %w", r.path, err)
	}
	r.released = true
	return nil
}

// Reclaim takes a file back that was released. It fails with [ErrLocked] while
// somebody else has it, and with [ErrWritten] if somebody has written it: the file
// stays released then. Of a block device only its size tells that.
func (r *Raw) Reclaim() error {
	if !r.released {
		return nil
	}
	if err := lock(r.fd, r.options.perm(), r.options.unshared()); err != nil {
		return lockError(r.path, r.fd, r.options, err)
	}
	now, err := r.Stamp()
	if err == nil {
		if d := r.left.Difference(now); d != "" {
			err = &Error{
				Path: r.path, Err: ErrWritten, Reason: "was changed by another while it was given up: " + d,
				Cure: "find out who did, since the guest here does not know of it, and end the guest",
			}
		}
	}
	if err != nil {
		return errors.Join(err, setLock(r.fd, unix.F_UNLCK, 0, unsharedBase+permCount))
	}
	r.released = false
	return nil
}

// DropCache lets the host forget what it has of the file in its page cache and
// need not write: what is read next comes from where the file is.
func (r *Raw) DropCache() error {
	if err := unix.Fadvise(r.fd, 0, 0, unix.FADV_DONTNEED); err != nil {
		return fmt.Errorf("disk %s: drop its page cache: %w", r.path, err)
	}
	return nil
}
