package disk

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Options say how to open a disk.
type Options struct {
	ReadOnly bool
	Cache    Cache
	// Container: the file holds an image format of its own, which the opener
	// knows how to read; see [Raw.ReadBuffered].
	Container bool
	// Unlocked takes no lock: what is read may change at any time.
	Unlocked bool
	// Raw takes the bytes as they are, even if they begin like an image
	// format that is not raw.
	Raw bool
}

// Error is a disk that cannot be opened, on one line: what was asked for,
// what is wrong with it, and what to do.
type Error struct {
	Path   string
	Reason string
	Cure   string
	Err    error // the system's error, if there was one
}

// Error implements error.
func (e *Error) Error() string {
	return fmt.Sprintf("disk %s: %s: %s", e.Path, e.Reason, e.Cure)
}

// Unwrap returns the system's error.
func (e *Error) Unwrap() error { return e.Err }

// ErrFrozen is wrapped by the [Error] of a file that is to be opened for writing
// and has no write permission for anybody. That is how layers are marked which
// snapshots and overlays need as they are, and it holds for the superuser too.
var ErrFrozen = errors.New("disk is frozen")

func frozenError(path string) error {
	return &Error{
		Path: path, Err: ErrFrozen, Reason: "is frozen: it has no write permission for anybody, since snapshots need it as it is",
		Cure: "put an overlay on it with 'ditto image overlay', or, if there is no such snapshot, 'chmod u+w' it",
	}
}

// isFrozen reports whether a file may be written by nobody.
func isFrozen(mode uint32) bool { return mode&unix.S_IFMT == unix.S_IFREG && mode&0o222 == 0 }

// ErrLocked is wrapped by the [Error] of a disk that another process uses.
var ErrLocked = errors.New("disk is locked")

// Open opens and locks a raw image file or block device. What a user can get
// wrong is an [*Error].
func Open(path string, o Options) (*Raw, error) {
	fd, err := openFile(path, o)
	if err != nil {
		return nil, err
	}
	return Adopt(path, fd, -1, o)
}

// Adopt is Open for a file that is open already: as fd and, in cache mode none,
// a second time without O_DIRECT as buffered, -1 for none. A process that may
// not open files is handed them so. Both belong to the image, or are closed.
func Adopt(path string, fd, buffered int, o Options) (*Raw, error) {
	r, err := adopt(path, fd, buffered, o)
	if err != nil && buffered >= 0 {
		_ = unix.Close(buffered) // the reason is what counts
	}
	return r, err
}

// adopt closes fd if it fails.
func adopt(path string, fd, buffered int, o Options) (*Raw, error) {
	r := &Raw{fd: fd, meta: buffered, path: path, options: o}
	if err := r.inspect(); err != nil {
		return nil, closeAfter(fd, err)
	}
	if err := lock(fd, o.perm(), o.unshared()); err != nil {
		return nil, closeAfter(fd, lockError(path, fd, o, err))
	}
	if err := r.openBuffered(); err != nil {
		return nil, closeAfter(fd, err)
	}
	return r, nil
}

// perm is what an opener does with the file, and unshared what nobody else may.
func (o Options) perm() int {
	switch {
	case o.Unlocked:
		return 0
	case o.ReadOnly:
		return permRead
	case o.Container:
		return permRead | permWrite | permResize
	}
	return permRead | permWrite
}

func (o Options) unshared() int {
	if o.Unlocked {
		return 0
	}
	return permWrite | permResize
}

// closeAfter closes fd because of err.
func closeAfter(fd int, err error) error {
	// The reason is what counts; closing what was only opened loses nothing.
	_ = unix.Close(fd)
	return err
}

// openFile opens path and explains why it cannot. A FIFO must not block it.
func openFile(path string, o Options) (int, error) {
	flags := unix.O_CLOEXEC | unix.O_NONBLOCK | unix.O_NOCTTY
	if o.ReadOnly {
		flags |= unix.O_RDONLY
	} else {
		flags |= unix.O_RDWR
	}
	if o.Cache == CacheNone {
		flags |= unix.O_DIRECT
	}
	for {
		fd, err := unix.Open(path, flags, 0)
		if err == nil {
			// io_uring gives up instead of waiting on such a file.
			if err := unix.SetNonblock(fd, false); err != nil {
				return -1, closeAfter(fd, openError(path, o, err))
			}
			return fd, nil
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		var st unix.Stat_t
		if errors.Is(err, unix.EACCES) && !o.ReadOnly && unix.Stat(path, &st) == nil && isFrozen(st.Mode) {
			return -1, frozenError(path)
		}
		return -1, openError(path, o, err)
	}
}

func openError(path string, o Options, err error) error {
	e := &Error{Path: path, Err: err, Reason: err.Error(), Cure: "check the path"}
	switch {
	case errors.Is(err, unix.ENOENT):
		e.Reason, e.Cure = "does not exist", "check the path, or make one with 'ditto image disk'"
	case errors.Is(err, unix.EISDIR):
		e.Reason, e.Cure = "is a directory", "name an image file or a block device, or make an image of the directory with 'ditto image disk'"
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EPERM):
		e.Reason, e.Cure = "no permission to read and write it", "change its owner or mode, or open it read-only"
		if o.ReadOnly {
			e.Reason, e.Cure = "no permission to read it", "change its owner or mode"
		}
	case errors.Is(err, unix.EROFS):
		e.Reason, e.Cure = "is on a read-only file system", "open it read-only, or copy it elsewhere"
	case errors.Is(err, unix.EINVAL) && o.Cache == CacheNone:
		e.Reason, e.Cure = "its file system does not support cache mode none (O_DIRECT)", "use cache mode writeback"
	case errors.Is(err, unix.EBUSY):
		e.Reason, e.Cure = "the device is in use", "unmount it first"
	}
	return e
}

// inspect learns type, size and alignment, and refuses what is no raw disk.
func (r *Raw) inspect() error {
	var st unix.Stat_t
	if err := unix.Fstat(r.fd, &st); err != nil {
		return &Error{Path: r.path, Err: err, Reason: err.Error(), Cure: "check the file system"}
	}
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG, unix.S_IFBLK:
	case unix.S_IFDIR:
		return openError(r.path, r.options, unix.EISDIR)
	default:
		return &Error{Path: r.path, Reason: "is neither a file nor a block device", Cure: "name an image file or a block device"}
	}
	if !r.options.ReadOnly && isFrozen(st.Mode) {
		return frozenError(r.path)
	}
	r.block = st.Mode&unix.S_IFMT == unix.S_IFBLK
	size, err := unix.Seek(r.fd, 0, unix.SEEK_END)
	if err != nil {
		return &Error{Path: r.path, Err: err, Reason: "its size cannot be found: " + err.Error(), Cure: "check the device"}
	}
	r.identity = Identity{
		Device: st.Dev, Inode: st.Ino, Size: size,
		Modified: time.Unix(st.Mtim.Sec, st.Mtim.Nsec),
	}
	r.size.Store(size)
	if r.block {
		r.identity.Device, r.identity.Inode = st.Rdev, 0
	}
	if err := r.align(); err != nil {
		return err
	}
	return r.checkContent()
}

// align learns the logical block size, and for O_DIRECT what memory must be
// aligned to.
func (r *Raw) align() error {
	r.blockSize, r.memAlign = SectorSize, 1
	if r.block {
		if n, err := unix.IoctlGetInt(r.fd, unix.BLKSSZGET); err == nil && n > 0 {
			r.blockSize = n
		}
	}
	if r.options.Cache != CacheNone {
		return nil
	}
	r.memAlign = r.blockSize
	var stx unix.Statx_t
	if err := unix.Statx(r.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx); err != nil || stx.Mask&unix.STATX_DIOALIGN == 0 {
		return nil // an old kernel: the block size is what it asks for
	}
	if stx.Dio_offset_align == 0 {
		return openError(r.path, r.options, unix.EINVAL)
	}
	r.blockSize = max(r.blockSize, int(stx.Dio_offset_align))
	r.memAlign = int(stx.Dio_mem_align)
	return nil
}

// formats are images that are not raw, by how they begin.
var formats = [...]struct{ magic, name string }{
	{"QFI\xfb", "qcow2"},
	{"KDMV", "VMDK"},
	{"vhdxfile", "VHDX"},
	{"conectix", "VHD"},
	{"<<< ", "VDI"},
}

// checkContent refuses sizes and formats that cannot be a raw disk.
func (r *Raw) checkContent() error {
	size := r.identity.Size
	if r.options.Container {
		return nil
	}
	switch {
	case size == 0:
		return &Error{Path: r.path, Reason: "is empty", Cure: "give it a size, for example with 'truncate -s 8G'"}
	case size%int64(r.blockSize) != 0:
		return &Error{
			Path:   r.path,
			Reason: fmt.Sprintf("its size, %d bytes, is not a multiple of %d", size, r.blockSize),
			Cure:   fmt.Sprintf("round it up with 'truncate -s %%%d', or check that it is a raw disk", r.blockSize),
		}
	case r.options.Raw:
		return nil
	}
	head := r.buffer(r.blockSize)
	if err := r.ReadAtv([][]byte{head}, 0); err != nil {
		return &Error{Path: r.path, Err: err, Reason: "cannot be read: " + err.Error(), Cure: "check the file system and the device"}
	}
	if name := OtherFormat(head); name != "" {
		return &Error{
			Path:   r.path,
			Reason: "is a " + name + " image, not a raw one",
			Cure:   "convert it with 'qemu-img convert -O raw'",
		}
	}
	return nil
}

// OtherFormat names the format that is not raw of what begins with head, ""
// if there is none.
func OtherFormat(head []byte) string {
	for _, f := range formats {
		if strings.HasPrefix(string(head[:min(len(head), 16)]), f.magic) {
			return f.name
		}
	}
	return ""
}
