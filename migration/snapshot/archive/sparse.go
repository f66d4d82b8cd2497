package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

// chunk is how much is moved at once.
const chunk = 1 << 20

// extent is a range of a file, in bytes.
type extent struct{ start, end int64 }

// maxExtents bounds what is told of the holes of a file. Of more, the smallest
// are stored as zeros.
const maxExtents = 8192

// extentsOf returns what a file of size bytes stores, in ascending order. A file
// system that knows no holes stores everything.
func extentsOf(f *os.File, size int64) []extent {
	var all []extent
	fd := int(f.Fd())
	for at := int64(0); at < size; {
		start, err := unix.Seek(fd, at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		end := size
		if err == nil {
			end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		}
		if err != nil {
			start, end = at, size
		}
		if start < size {
			all = append(all, extent{start, min(end, size)})
		}
		at = end
	}
	for gap := int64(64 << 10); len(all) > maxExtents; gap *= 4 {
		all = fill(all, gap)
	}
	return all
}

// fill joins extents with holes of up to gap bytes between them.
func fill(all []extent, gap int64) []extent {
	var out []extent
	for _, e := range all {
		if n := len(out); n > 0 && e.start-out[n-1].end <= gap {
			out[n-1].end = e.end
			continue
		}
		out = append(out, e)
	}
	return out
}

// readExtent writes a range of a file to w.
func readExtent(ctx context.Context, w io.Writer, f *os.File, e extent, moved func(int64)) error {
	buf := make([]byte, min(chunk, e.end-e.start))
	for at := e.start; at < e.end; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(chunk, e.end-at)]
		if n, err := f.ReadAt(b, at); n < len(b) {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("%s was cut short", f.Name())
			}
			return err
		}
		if _, err := w.Write(b); err != nil {
			return err
		}
		at += int64(len(b))
		moved(int64(len(b)))
	}
	return nil
}

// writeSparse fills an empty file with size bytes from r. Zeros become holes.
func writeSparse(ctx context.Context, f *os.File, r io.Reader, size int64, moved func(int64)) error {
	buf := make([]byte, min(chunk, size))
	for at := int64(0); at < size; {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		b := buf[:min(chunk, size-at)]
		if _, err := io.ReadFull(r, b); err != nil {
			return err
		}
		if err := writeData(f, b, at); err != nil {
			return err
		}
		at += int64(len(b))
		moved(int64(len(b)))
	}
	return f.Truncate(size)
}

// writeData writes the rows of blocks of b that are not zeros.
func writeData(f *os.File, b []byte, off int64) error {
	for len(b) > 0 {
		hole := row(b, true)
		b, off = b[hole:], off+int64(hole)
		data := row(b, false)
		if _, err := f.WriteAt(b[:data], off); err != nil {
			return err
		}
		b, off = b[data:], off+int64(data)
	}
	return nil
}

// row returns how many bytes b begins with whose blocks are all zeros, or all
// not.
func row(b []byte, zero bool) int {
	n := 0
	for n < len(b) {
		block := b[n:min(len(b), n+layer.BlockSize)]
		if layer.IsZero(block) != zero {
			break
		}
		n += len(block)
	}
	return n
}
