package chain

import (
	"errors"
	"fmt"
	"strings"
	"sync/atomic"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// Chain is an open disk. It implements disk.Image.
type Chain struct {
	options Options
	probed  bool // the top's format was found by content
	newest  atomic.Pointer[Layer]
}

var _ disk.Image = (*Chain)(nil)

func (c *Chain) top() *Layer { return c.newest.Load() }

// Layers returns the layers, the top first.
func (c *Chain) Layers() []*Layer {
	var out []*Layer
	for l := c.top(); l != nil; l = l.below {
		out = append(out, l)
	}
	return out
}

// Path is how the top's file was named.
func (c *Chain) Path() string { return c.top().Path() }

// Cache is the mode the chain was opened with.
func (c *Chain) Cache() disk.Cache { return c.options.Cache }

// Size implements disk.Image.
func (c *Chain) Size() int64 { return c.top().Size() }

// ReadOnly implements disk.Image.
func (c *Chain) ReadOnly() bool { return c.options.ReadOnly }

// BlockSize implements disk.Image: what every layer can do.
func (c *Chain) BlockSize() int {
	n := 0
	for _, l := range c.Layers() {
		n = max(n, l.file.BlockSize())
	}
	return n
}

// Identity implements disk.Image: of the top's file.
func (c *Chain) Identity() disk.Identity { return c.top().file.Identity() }

// ReadAtv implements disk.Image.
func (c *Chain) ReadAtv(bufs [][]byte, offset int64) error { return c.top().ReadAtv(bufs, offset) }

// errDisguise is a guest that writes the header of an image format to a raw
// disk whose format was not given.
var errDisguise = errors.New("the write would make the raw disk look like an image of another format: give its format, raw, when it is opened")

// disguises reports whether a write would change what probing finds.
func (c *Chain) disguises(bufs [][]byte, offset int64) bool {
	if offset != 0 || !c.probed || c.top().image != nil {
		return false
	}
	var head []byte
	for _, b := range bufs {
		if head = append(head, b[:min(len(b), 8-len(head))]...); len(head) == 8 {
			break
		}
	}
	return disk.OtherFormat(head) != ""
}

// WriteAtv implements disk.Image. In writethrough mode it returns when the
// data are stable.
func (c *Chain) WriteAtv(bufs [][]byte, offset int64) error {
	if c.disguises(bufs, offset) {
		return errDisguise
	}
	return c.top().writeAtv(bufs, offset, c.options.Cache == disk.CacheWritethrough)
}

// Flush implements disk.Image.
func (c *Chain) Flush() error { return c.top().flush() }

// Discard implements disk.Image.
func (c *Chain) Discard(offset, n int64) error { return c.top().discard(offset, n) }

// WriteZeroes implements disk.Image.
func (c *Chain) WriteZeroes(offset, n int64, unmap bool) error {
	err := c.top().writeZeroes(offset, n, unmap)
	if err == nil && c.options.Cache == disk.CacheWritethrough {
		err = c.top().flush()
	}
	return err
}

// Resize gives the disk another size, in bytes. A qcow2 top can only grow.
func (c *Chain) Resize(size int64) error { return c.top().resize(size) }

// Close implements disk.Image. A top that was written is marked as closed
// properly.
func (c *Chain) Close() error {
	var errs []error
	for _, l := range c.Layers() {
		errs = append(errs, l.close())
	}
	return errors.Join(errs...)
}

// String lists the files, the top first.
func (c *Chain) String() string {
	var b strings.Builder
	for i, l := range c.Layers() {
		if i > 0 {
			b.WriteString(" on ")
		}
		fmt.Fprintf(&b, "%s (%s)", l.Path(), l.Format())
	}
	return b.String()
}

// Header returns the qcow2 header of the top; ok is false for raw.
func (c *Chain) Header() (qcow2.Header, bool) { return c.top().Header() }
