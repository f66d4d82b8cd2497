package disk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

// Raw is an open raw image file or block device. It implements [Image].
type Raw struct {
	fd        int
	meta      int // without O_DIRECT; may be fd
	path      string
	options   Options
	identity  Identity
	size      atomic.Int64 // bytes
	block     bool         // a block device
	blockSize int
	memAlign  int // of buffers, with O_DIRECT

	noPunch, noZeroRange atomic.Bool // the file system refused once
	flushLost            atomic.Bool

	witness int64 // a locked byte; 0 for none

	// While the file is released: what it was then.
	released bool
	left     layer.Stamp
}

// Size implements [Image].
func (r *Raw) Size() int64 { return r.size.Load() }

// BlockSize implements [Image].
func (r *Raw) BlockSize() int { return r.blockSize }

// ReadOnly implements [Image].
func (r *Raw) ReadOnly() bool { return r.options.ReadOnly }

// Identity implements [Image].
func (r *Raw) Identity() Identity {
	id := r.identity
	id.Size = r.Size()
	return id
}

// Path is what Open was given.
func (r *Raw) Path() string { return r.path }

// Cache is the mode it was opened with.
func (r *Raw) Cache() Cache { return r.options.Cache }

// Stamp reads the file's stamp as it is now.
func (r *Raw) Stamp() (layer.Stamp, error) {
	var st unix.Stat_t
	err := unix.Fstat(r.fd, &st)
	size := int64(0)
	if err == nil {
		size, err = r.Length()
	}
	if err != nil {
		return layer.Stamp{}, fmt.Errorf("disk %s: %w", r.path, err)
	}
	return layer.Stamp{Size: size, Mtime: st.Mtim.Nano(), Ctime: st.Ctim.Nano(), Device: st.Dev, Inode: st.Ino}, nil
}

// Dup returns the open file once more, for mapping it. The caller closes it.
func (r *Raw) Dup() (*os.File, error) {
	fd, err := unix.FcntlInt(uintptr(r.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("disk %s: %w", r.path, err)
	}
	return os.NewFile(uintptr(fd), r.path), nil
}

// Close implements [Image].
func (r *Raw) Close() error {
	// io_uring reports a request before it lets go of the file; the lock is
	// given up here and now.
	_ = setLock(r.fd, unix.F_UNLCK, 0, unsharedBase+permCount)
	if r.meta != r.fd {
		_ = unix.Close(r.meta)
	}
	if err := unix.Close(r.fd); err != nil {
		return fmt.Errorf("close disk %s: %w", r.path, err)
	}
	return nil
}

// ReadAtv implements [Image].
func (r *Raw) ReadAtv(bufs [][]byte, offset int64) error {
	if r.misaligned(bufs) {
		return r.readBounced(bufs, offset)
	}
	return transfer(bufs, offset, func(bufs [][]byte, offset int64) (int, error) {
		if r.options.Container {
			return r.readGrowing(bufs, offset)
		}
		return unix.Preadv(r.fd, bufs, offset)
	})
}

// WriteAtv implements [Image]. In writethrough mode it returns when the data
// are stable.
func (r *Raw) WriteAtv(bufs [][]byte, offset int64) error {
	return r.writeAtv(bufs, offset, r.options.Cache == CacheWritethrough)
}

// writeAtv writes, and with sync returns when the data are stable.
func (r *Raw) writeAtv(bufs [][]byte, offset int64, sync bool) error {
	if r.misaligned(bufs) {
		return r.writeBounced(bufs, offset, sync)
	}
	flags := 0
	if sync {
		flags = unix.RWF_DSYNC
	}
	return transfer(bufs, offset, func(bufs [][]byte, offset int64) (int, error) {
		return unix.Pwritev2(r.fd, bufs, offset, flags)
	})
}

// transfer repeats op until all of bufs is done. It does not change bufs.
func transfer(bufs [][]byte, offset int64, op func([][]byte, int64) (int, error)) error {
	own := false
	for {
		n, err := op(bufs[:min(len(bufs), iovMax)], offset)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return err
		}
		offset += int64(n)
		if bufs, own = advance(bufs, n, own); len(bufs) == 0 {
			return nil
		}
		if n == 0 {
			return io.ErrUnexpectedEOF
		}
	}
}

// iovMax is how many buffers one system call takes (IOV_MAX).
const iovMax = 1024

// advance drops the first n bytes. It copies the slice before it shortens a
// buffer, unless the slice is its own already.
func advance(bufs [][]byte, n int, own bool) ([][]byte, bool) {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n == 0 {
		return bufs, own
	}
	if !own {
		bufs = append([][]byte(nil), bufs...)
	}
	bufs[0] = bufs[0][n:]
	return bufs, true
}

// readBounced reads through an aligned copy: O_DIRECT asks for alignment that
// firmware drivers do not keep.
func (r *Raw) readBounced(bufs [][]byte, offset int64) error {
	aligned := r.buffer(length(bufs))
	if err := r.ReadAtv([][]byte{aligned}, offset); err != nil {
		return err
	}
	for _, b := range bufs {
		aligned = aligned[copy(b, aligned):]
	}
	return nil
}

// writeBounced writes through an aligned copy.
func (r *Raw) writeBounced(bufs [][]byte, offset int64, sync bool) error {
	aligned := r.buffer(length(bufs))
	n := 0
	for _, b := range bufs {
		n += copy(aligned[n:], b)
	}
	return r.writeAtv([][]byte{aligned}, offset, sync)
}

// length is the sum of the lengths of bufs.
func length(bufs [][]byte) int {
	n := 0
	for _, b := range bufs {
		n += len(b)
	}
	return n
}

// ErrFlushLost is returned by every flush after one that failed: the kernel
// has marked the pages clean, so a later success would be a lie.
var ErrFlushLost = errors.New("an earlier flush failed, written data may be lost")

// Flush implements [Image].
func (r *Raw) Flush() error {
	for {
		if err := unix.Fdatasync(r.fd); !errors.Is(err, unix.EINTR) {
			return r.flushed(err)
		}
	}
}

// flushed remembers a failed flush and turns later successes into failures.
func (r *Raw) flushed(err error) error {
	if err != nil {
		r.flushLost.Store(true)
		return err
	}
	if r.flushLost.Load() {
		return ErrFlushLost
	}
	return nil
}
