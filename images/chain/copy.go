package chain

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// Convert copies what a disk reads as to a new image without anything below
// it. Zeros take no space. The image appears when it is complete and stable,
// and never takes the place of another file. progress, if not nil, hears how
// many bytes of the disk are done.
func Convert(ctx context.Context, c *Chain, path string, format Format, progress func(done int64)) error {
	if _, err := os.Lstat(path); err == nil {
		return &disk.Error{Path: path, Err: os.ErrExist, Reason: "exists already", Cure: "remove it, or name another file"}
	}
	dir, err := os.MkdirTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return &disk.Error{Path: path, Err: err, Reason: "cannot be made: " + err.Error(), Cure: "check the folder, its rights and its space"}
	}
	defer func() { _ = os.RemoveAll(dir) }() // the image has another name by then
	work := filepath.Join(dir, "image")
	if err := create(work, format, c.Size()); err != nil {
		return err
	}
	out, err := Open(work, Options{Format: format})
	if err != nil {
		return err
	}
	if err := errors.Join(copyData(ctx, c, out, progress), out.Flush(), out.Close()); err != nil {
		return fmt.Errorf("convert %s: %w", c.Path(), err)
	}
	if err := os.Link(work, path); err != nil {
		return fmt.Errorf("convert %s: %w", c.Path(), err)
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// Create makes an empty image without anything below it. It fails if path exists.
func Create(path string, format Format, size int64) error { return create(path, format, size) }

// create makes an empty image.
func create(path string, format Format, size int64) error {
	switch format {
	case Qcow2:
		return qcow2.Create(path, qcow2.CreateOptions{Size: size})
	case Raw:
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(size), f.Close())
	}
	return &disk.Error{Path: path, Reason: fmt.Sprintf("cannot have the format %q", format), Cure: "use raw or qcow2"}
}

// copyData copies all that is not zero to an empty disk.
func copyData(ctx context.Context, from, to *Chain, progress func(int64)) error {
	top, buf := from.top(), make([]byte, mergeChunk)
	for at := int64(0); ; {
		start, end, err := top.NextData(at)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err == nil {
			err = ctx.Err()
		}
		if err != nil {
			return err
		}
		b := buf[:min(end-start, mergeChunk)]
		if err := from.ReadAtv([][]byte{b}, start); err != nil {
			return err
		}
		if !zeroes(b) {
			if err := to.WriteAtv([][]byte{b}, start); err != nil {
				return err
			}
		}
		if at = start + int64(len(b)); progress != nil {
			progress(at)
		}
	}
}

func zeroes(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// Commit writes what the overlay at path holds itself to the image it is
// stacked on, which makes all other overlays of that image useless. Nobody may
// have either open. The overlay stays and reads as before.
func Commit(path string) (below string, err error) {
	top, err := openLayer(path, Options{})
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, top.close()) }()
	name, format := top.backing()
	if name == "" {
		return "", &disk.Error{Path: path, Reason: "has no backing file", Cure: "name an overlay"}
	}
	if below, err = top.resolve(name, format); err != nil {
		return "", err
	}
	base, err := Open(below, Options{Format: format})
	if err != nil {
		return below, fmt.Errorf("below %s: %w", path, err)
	}
	defer func() { err = errors.Join(err, base.Close()) }()
	top.attach(base.top())
	return below, merge(top, base.top())
}
