package chain

import (
	"errors"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// CreateOverlay makes an empty overlay of size bytes on an image. The image is
// named by its path relative to the overlay's folder where that is below or
// beside it, so that both can be moved together.
func CreateOverlay(path, below string, format Format, size int64) error {
	name, err := backingName(path, below)
	if err != nil {
		return &disk.Error{Path: path, Err: err, Reason: "cannot name its backing file: " + err.Error(), Cure: "check the paths"}
	}
	return qcow2.Create(path, qcow2.CreateOptions{Size: size, Backing: name, BackingFormat: string(format)})
}

// backingName is how an overlay at path calls the image below.
func backingName(path, below string) (string, error) {
	full, err := filepath.Abs(below)
	if err != nil {
		return "", err
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return "", err
	}
	if name, err := filepath.Rel(dir, full); err == nil && filepath.IsLocal(name) {
		if protocol(name) {
			name = "./" + name
		}
		return name, nil
	}
	return full, nil
}

// CreateOverlay makes an empty overlay for [Chain.Stack] on the present top.
func (c *Chain) CreateOverlay(path string) error {
	return CreateOverlay(path, c.Path(), c.top().Format(), c.Size())
}

// Stack puts the overlay at path on top. The former top is flushed, open for
// reading only from then on, and others may read it too. Call it when nothing
// is in flight; queues go on with the new top. After an error the chain is as
// it was, unless it wraps [ErrFrozen].
func (c *Chain) Stack(path string) error {
	overlay, err := openQcow2(path, Options{Cache: c.options.Cache})
	if err != nil {
		return err
	}
	if err := c.isOn(overlay); err != nil {
		return errors.Join(err, overlay.close())
	}
	return c.stack(overlay)
}

// StackFD is Stack for a process that may not open files: the overlay was made
// by CreateOverlay and opened for reading and writing elsewhere, in cache mode
// none with O_DIRECT as fd and without as buffered, otherwise buffered is -1.
// Both belong to the chain, or are closed.
func (c *Chain) StackFD(path string, fd, buffered int) error {
	o := disk.Options{Cache: c.options.Cache, Container: true}
	file, err := disk.Adopt(path, fd, buffered, o)
	if err != nil {
		return err
	}
	overlay, err := readQcow2(file, Options{Cache: c.options.Cache})
	if err != nil {
		return err
	}
	return c.stack(overlay)
}

// stack makes an overlay the top, or closes it.
func (c *Chain) stack(overlay *Layer) error {
	old := c.top()
	if err := c.fits(overlay); err != nil {
		return errors.Join(err, overlay.close())
	}
	if err := old.freeze(); err != nil {
		return errors.Join(fmt.Errorf("disk %s: %w: %w", c.Path(), ErrFrozen, err), overlay.close())
	}
	overlay.attach(old)
	c.newest.Store(overlay)
	return nil
}

// ErrFrozen is a top that can be written no more although nothing was stacked
// on it, because it could not be flushed.
var ErrFrozen = errors.New("its last writes may be lost")

// fits checks that an overlay can be on the top.
func (c *Chain) fits(overlay *Layer) error {
	top := c.top()
	name, format := overlay.backing()
	switch {
	case c.ReadOnly():
		return &disk.Error{Path: c.Path(), Reason: "is open read-only", Cure: "make overlays of disks that the machine writes"}
	case name == "":
		return &disk.Error{Path: overlay.Path(), Reason: "has no backing file", Cure: "make it an overlay of " + top.Path()}
	case format != top.Format():
		return &disk.Error{Path: overlay.Path(), Reason: fmt.Sprintf("is an overlay of a %s image", format), Cure: fmt.Sprintf("make it one of %s (%s)", top.Path(), top.Format())}
	case overlay.Size() != c.Size():
		return &disk.Error{Path: overlay.Path(), Reason: fmt.Sprintf("is a disk of %d bytes", overlay.Size()), Cure: fmt.Sprintf("make it one of %d bytes", c.Size())}
	}
	return nil
}

// isOn checks that an overlay names the top as its backing file.
func (c *Chain) isOn(overlay *Layer) error {
	top := c.top()
	if err := c.fits(overlay); err != nil {
		return err
	}
	name, format := overlay.backing()
	below, err := overlay.resolve(name, format)
	if err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(below, &st); err != nil {
		return &disk.Error{Path: below, Err: err, Reason: err.Error(), Cure: "check the path"}
	}
	id := top.file.Identity()
	device, inode := st.Dev, st.Ino
	if st.Mode&unix.S_IFMT == unix.S_IFBLK {
		device, inode = st.Rdev, 0
	}
	if id.Device != device || id.Inode != inode {
		return &disk.Error{Path: overlay.Path(), Reason: "is an overlay of " + below, Cure: "make it one of " + top.Path()}
	}
	return nil
}

// Freeze ends writing to the disk, as [Chain.Stack] does before it puts an
// overlay on top. Call it when nothing is in flight. After an error the disk is
// [ErrFrozen].
func (c *Chain) Freeze() error {
	if c.ReadOnly() {
		return nil
	}
	if err := c.top().freeze(); err != nil {
		return fmt.Errorf("disk %s: %w: %w", c.Path(), ErrFrozen, err)
	}
	return nil
}

// Thaw undoes Freeze.
func (c *Chain) Thaw() error {
	if c.ReadOnly() {
		return nil
	}
	return c.top().thaw()
}

// freeze ends writing to a layer.
func (l *Layer) freeze() error {
	err := l.flush()
	if l.image != nil {
		err = l.image.Freeze()
	}
	if err != nil {
		return err
	}
	l.thawable = true
	return l.file.GiveUpWriting()
}

// thaw lets a layer be written again that freeze froze.
func (l *Layer) thaw() error {
	if !l.thawable {
		return &disk.Error{Path: l.Path(), Reason: "was opened read-only", Cure: "merge it with 'ditto image commit' when the machine is off"}
	}
	if err := l.file.TakeUpWriting(); err != nil {
		return err
	}
	if l.image != nil {
		l.image.Thaw()
	}
	l.thawable = false
	return nil
}

// Unstack undoes a Stack: what was written since goes into the layer below,
// which is the top again. Call it when nothing is in flight. The overlay's
// file stays and is of no use. After an error the overlay is still the top.
func (c *Chain) Unstack() error {
	overlay := c.top()
	if overlay.below == nil {
		return &disk.Error{Path: c.Path(), Reason: "is on nothing", Cure: "stack it first"}
	}
	if err := overlay.flush(); err != nil {
		return err
	}
	if err := overlay.below.thaw(); err != nil {
		return err
	}
	if err := merge(overlay, overlay.below); err != nil {
		return errors.Join(err, overlay.below.freeze())
	}
	c.newest.Store(overlay.below)
	return overlay.close()
}

// mergeChunk is how much is copied at once.
const mergeChunk = 1 << 20

// merge writes to below what the overlay holds itself, and makes it stable.
func merge(overlay, below *Layer) error {
	if overlay.Size() > below.Size() {
		if err := below.resize(overlay.Size()); err != nil {
			return err
		}
	}
	buf := make([]byte, mergeChunk)
	for at := int64(0); at < overlay.Size(); {
		e, _, err := overlay.lookup(at, min(overlay.Size()-at, mergeChunk), true)
		if err != nil {
			return err
		}
		switch e.Kind {
		case qcow2.Unallocated:
		case qcow2.Zero:
			err = below.writeZeroes(at, e.Length, true)
		default:
			b := [][]byte{buf[:e.Length]}
			if err = overlay.ReadAtv(b, at); err == nil {
				err = below.writeAtv(b, at, false)
			}
		}
		if err != nil {
			return err
		}
		at += e.Length
	}
	return below.flush()
}

func (l *Layer) resize(size int64) error {
	if l.image == nil {
		return l.file.Resize(size)
	}
	return named(l.image.Resize(size), l.Path())
}
