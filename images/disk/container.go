package disk

import (
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"
)

// A container is a file that holds an image format of its own. It may have any
// length, grows when it is written beyond its end, and reads as zeros there.
// Format code reads and writes its structures through the host's page cache at
// any alignment, whatever the cache mode; guest data must not share a page
// with them in cache mode none.

// openBuffered opens the file a second time, without O_DIRECT.
func (r *Raw) openBuffered() error {
	if r.meta >= 0 {
		return nil // handed to us
	}
	r.meta = r.fd
	if r.options.Cache != CacheNone {
		return nil
	}
	flags := unix.O_RDWR
	if r.options.ReadOnly {
		flags = unix.O_RDONLY
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", r.fd), flags|unix.O_CLOEXEC, 0)
	if err != nil {
		return &Error{Path: r.path, Err: err, Reason: "cannot be opened again: " + err.Error(), Cure: "mount /proc, or use cache mode writeback"}
	}
	r.meta = fd
	return nil
}

// Length is how long the file is now, in bytes.
func (r *Raw) Length() (int64, error) { return unix.Seek(r.fd, 0, unix.SEEK_END) }

// Growable reports that writing beyond the end makes the file longer.
func (r *Raw) Growable() bool { return r.options.Container && !r.block }

// endsBefore reports whether a container that gave no more than what ends at
// offset has none of the next n bytes.
func (r *Raw) endsBefore(offset int64, n int) bool {
	if !r.options.Container || n == 0 {
		return false
	}
	end, err := r.Length()
	return err == nil && end <= offset
}

// wholeBlocks is the part of n bytes after which O_DIRECT can go on.
func (r *Raw) wholeBlocks(n int) int { return n - n%r.blockSize }

// readGrowing is preadv of a container, which others may be making longer. It
// returns 0 for an error only.
func (r *Raw) readGrowing(bufs [][]byte, offset int64) (int, error) {
	want := length(bufs)
	for {
		n, err := unix.Preadv(r.fd, bufs, offset)
		if err != nil || n == want {
			return n, err
		}
		if r.endsBefore(offset+int64(n), want-n) {
			zeroAfter(bufs, n)
			return want, nil
		}
		if n = r.wholeBlocks(n); n > 0 {
			return n, nil
		}
	}
}

// zeroAfter clears bufs from a byte on.
func zeroAfter(bufs [][]byte, skip int) {
	for _, b := range bufs {
		k := min(skip, len(b))
		clear(b[k:])
		skip -= k
	}
}

// ReadBuffered fills p from offset of a container, with zeros beyond its end.
func (r *Raw) ReadBuffered(p []byte, offset int64) error {
	for len(p) > 0 {
		n, err := unix.Pread(r.meta, p, offset)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0:
			clear(p)
			return nil
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// WriteBuffered writes p at offset of a container. It is stable after Flush.
func (r *Raw) WriteBuffered(p []byte, offset int64) error {
	for len(p) > 0 {
		n, err := unix.Pwrite(r.meta, p, offset)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		}
		p, offset = p[n:], offset+int64(n)
	}
	return nil
}

// GiveUpWriting lets others open the file for reading, and goes on reading it
// as if it had been opened so: as a layer that others are stacked on. Nothing
// may be in flight.
func (r *Raw) GiveUpWriting() error {
	for _, perm := range []int64{1, 3} { // write, resize
		if err := setLock(r.fd, unix.F_UNLCK, permBase+perm, 1); err != nil {
			return fmt.Errorf("disk %s: %w", r.path, err)
		}
	}
	r.options.ReadOnly = true
	return nil
}

// TakeUpWriting is the reverse, for a file that was opened for writing. It
// fails while another process has the file open.
func (r *Raw) TakeUpWriting() error {
	o := r.options
	o.ReadOnly = false
	if err := applyLocks(r.fd, o.perm(), 0); err != nil {
		return lockError(r.path, r.fd, r.options, err)
	}
	if err := checkLocks(r.fd, o.perm(), o.unshared()); err != nil {
		return errors.Join(lockError(r.path, r.fd, r.options, err), r.GiveUpWriting())
	}
	r.options.ReadOnly = false
	return nil
}

// NextData returns the next range at or after off that the file stores; what
// lies between is zeros. After the last it returns io.EOF. Where the file
// system knows no holes, the range is all of the rest.
func (r *Raw) NextData(off int64) (start, end int64, err error) {
	start, err = unix.Seek(r.fd, off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return off, r.Size(), nil
	case err != nil:
		return 0, 0, fmt.Errorf("disk %s: find data: %w", r.path, err)
	}
	if end, err = unix.Seek(r.fd, start, unix.SEEK_HOLE); err != nil {
		return 0, 0, fmt.Errorf("disk %s: find the next hole: %w", r.path, err)
	}
	return start, end, nil
}
