package layer

import (
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// File is a raw layer, a file or block device opened for reading: what the guest
// reads is what the file holds.
type File struct {
	f    *os.File
	size int64
}

// OpenFile opens a raw layer.
func OpenFile(path string) (*File, error) {
	// O_NONBLOCK: opening a FIFO by mistake must not hang.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() && info.Mode()&(os.ModeDevice|os.ModeCharDevice) != os.ModeDevice {
		err = fmt.Errorf("%s is neither a file nor a block device", path)
	}
	var size int64
	if err == nil {
		size, err = f.Seek(0, io.SeekEnd)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("layer %s: %w", path, err), f.Close())
	}
	return &File{f: f, size: size}, nil
}

// Close closes the file.
func (f *File) Close() error { return f.f.Close() }

// Size returns the layer's size in bytes, as it was when it was opened.
func (f *File) Size() int64 { return f.size }

// OSFile returns the open file, for mapping it.
func (f *File) OSFile() *os.File { return f.f }

// ReadAt implements io.ReaderAt.
func (f *File) ReadAt(p []byte, off int64) (int, error) { return f.f.ReadAt(p, off) }

// Stamp reads the file's stamp as it is now.
func (f *File) Stamp() (Stamp, error) {
	size, err := f.f.Seek(0, io.SeekEnd)
	if err != nil {
		return Stamp{}, fmt.Errorf("layer %s: %w", f.f.Name(), err)
	}
	s, err := stampOf(int(f.f.Fd()), size)
	if err != nil {
		return Stamp{}, fmt.Errorf("layer %s: %w", f.f.Name(), err)
	}
	return s, nil
}

// NextData returns the next range at or after off that the file stores; what
// lies between is zeros. After the last it returns io.EOF. Where the file system
// knows no holes the range is all of the rest.
func (f *File) NextData(off int64) (start, end int64, err error) {
	if off >= f.size {
		return 0, 0, io.EOF
	}
	start, err = f.f.Seek(off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return 0, 0, io.EOF
	case errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP):
		return off, f.size, nil
	case err != nil:
		return 0, 0, fmt.Errorf("layer %s: find data: %w", f.f.Name(), err)
	}
	if end, err = f.f.Seek(start, unix.SEEK_HOLE); err != nil {
		return 0, 0, fmt.Errorf("layer %s: find the next hole: %w", f.f.Name(), err)
	}
	if start >= f.size {
		return 0, 0, io.EOF
	}
	return start, min(end, f.size), nil
}
