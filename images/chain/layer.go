package chain

import (
	"errors"
	"io"

	"ditto.vm/images/disk"
	"ditto.vm/images/layer"
	"ditto.vm/images/qcow2"
)

// Layer is one image of a chain. It reads as the disk that it and what is
// below it make up.
type Layer struct {
	file  *disk.Raw
	image *qcow2.File // nil for raw
	below *Layer      // nil at the bottom

	thawable bool // it was written until another was stacked on it
}

// attach stacks the layer on another.
func (l *Layer) attach(below *Layer) {
	l.below = below
	l.image.SetBacking(below)
}

// Path is how the layer's file was named.
func (l *Layer) Path() string { return l.file.Path() }

// Format is raw or qcow2.
func (l *Layer) Format() Format {
	if l.image == nil {
		return Raw
	}
	return Qcow2
}

// File is the open file, for mapping what Map finds in it.
func (l *Layer) File() *disk.Raw { return l.file }

// Header describes a qcow2 layer; ok is false for raw.
func (l *Layer) Header() (h qcow2.Header, ok bool) {
	if l.image == nil {
		return h, false
	}
	return l.image.Header(), true
}

// same reports whether two layers are one file.
func (l *Layer) same(o *Layer) bool {
	a, b := l.file.Identity(), o.file.Identity()
	return a.Device == b.Device && a.Inode == b.Inode
}

// Size is the length of the disk in bytes, as the layer says.
func (l *Layer) Size() int64 {
	if l.image == nil {
		// Zeros fill the last block of a backing file.
		block := int64(l.file.BlockSize())
		return (l.file.Size() + block - 1) / block * block
	}
	return l.image.Size()
}

// ReadAtv implements qcow2.Backing: it fills bufs from offset.
func (l *Layer) ReadAtv(bufs [][]byte, offset int64) error {
	if l.image == nil {
		return l.file.ReadAtv(bufs, offset)
	}
	return l.image.ReadAtv(bufs, offset)
}

// ReadAt implements io.ReaderAt.
func (l *Layer) ReadAt(p []byte, offset int64) (int, error) {
	n := min(int64(len(p)), l.Size()-offset)
	if n <= 0 {
		return 0, io.EOF
	}
	if err := l.ReadAtv([][]byte{p[:n]}, offset); err != nil {
		return 0, err
	}
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// lookup finds the extent at offset in this layer alone. Where a raw image
// ends the disk goes on in zeros.
func (l *Layer) lookup(offset, n int64, wait bool) (e qcow2.Extent, ok bool, err error) {
	switch left := l.Size() - offset; {
	case left <= 0:
		return qcow2.Extent{Kind: qcow2.Zero, Length: n}, true, nil
	case l.image == nil:
		return qcow2.Extent{Kind: qcow2.Data, Length: min(n, left), Host: offset, InPlace: true}, true, nil
	default:
		n = min(n, left)
	}
	if e, ok = l.image.Cached(offset, n); ok || !wait {
		return e, ok, nil
	}
	e, err = l.image.Map(offset, n)
	return e, err == nil, err
}

// NextData returns the next range at or after off that may hold something but
// zeros, or io.EOF.
func (l *Layer) NextData(off int64) (start, end int64, err error) {
	for start = off; start < l.Size(); {
		e, err := l.find(start, l.Size()-start)
		if err != nil {
			return 0, 0, err
		}
		switch e.Kind {
		case qcow2.Compressed:
			return start, start + e.Length, nil
		case qcow2.Data:
			if e.Layer.image != nil {
				return start, start + e.Length, nil
			}
			// A raw file has holes of its own.
			from, to, err := e.Layer.file.NextData(start)
			switch {
			case errors.Is(err, io.EOF):
			case err != nil:
				return 0, 0, err
			case from < start+e.Length:
				return from, min(to, start+e.Length), nil
			}
		}
		start += e.Length
	}
	return 0, 0, io.EOF
}

// Stamp says in what state the files of the layer and of all below are: of the
// file that was written last.
func (l *Layer) Stamp() (layer.Stamp, error) {
	var out layer.Stamp
	for at := l; at != nil; at = at.below {
		s, err := at.file.Stamp()
		if err != nil {
			return out, err
		}
		if at == l {
			out = s
			out.Size = l.Size()
			continue
		}
		out.Mtime, out.Ctime = max(out.Mtime, s.Mtime), max(out.Ctime, s.Ctime)
	}
	return out, nil
}

// writeAtv writes bufs at offset; with sync it returns when they are stable.
func (l *Layer) writeAtv(bufs [][]byte, offset int64, sync bool) error {
	if l.image == nil {
		// In writethrough mode it is stable anyway.
		return l.file.WriteAtv(bufs, offset)
	}
	err := l.image.WriteAtv(bufs, offset)
	if err == nil && sync {
		err = l.image.Flush()
	}
	return err
}

func (l *Layer) flush() error {
	if l.image == nil {
		return l.file.Flush()
	}
	return l.image.Flush()
}

func (l *Layer) discard(offset, n int64) error {
	if l.image == nil {
		return l.file.Discard(offset, n)
	}
	return l.image.Discard(offset, n)
}

func (l *Layer) writeZeroes(offset, n int64, unmap bool) error {
	if l.image == nil {
		return l.file.WriteZeroes(offset, n, unmap)
	}
	return l.image.WriteZeroes(offset, n, unmap)
}

func (l *Layer) close() error {
	var err error
	if l.image != nil {
		err = l.image.Close()
	}
	return errors.Join(err, l.file.Close())
}
