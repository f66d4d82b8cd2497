package chain

import (
	"errors"
	"fmt"
)

// Release gives up the disk, so that somebody else can open it: a machine that
// goes on elsewhere. What was written is stable then. Nothing may be in flight,
// nor begin before [Chain.Reclaim]. After an error the disk may be released in
// parts: Reclaim takes it back all the same.
//
// A disk that is closed while it is released is not touched.
func (c *Chain) Release() error {
	for _, l := range c.Layers() {
		if err := l.release(!c.ReadOnly() && l == c.top()); err != nil {
			return fmt.Errorf("give up disk %s: %w", c.Path(), err)
		}
	}
	return nil
}

// Reclaim takes a disk back that was released. It fails with [disk.ErrLocked]
// while somebody else has it and with [disk.ErrWritten] if somebody has written
// it, and then it is still released.
func (c *Chain) Reclaim() error {
	layers := c.Layers()
	for i := len(layers) - 1; i >= 0; i-- {
		if err := layers[i].file.Reclaim(); err != nil {
			return errors.Join(fmt.Errorf("take back disk %s: %w", c.Path(), err), c.releaseLocks())
		}
	}
	if top := c.top(); !c.ReadOnly() && top.image != nil {
		top.image.Thaw()
	}
	return nil
}

// releaseLocks gives up the locks again.
func (c *Chain) releaseLocks() error {
	var errs []error
	for _, l := range c.Layers() {
		errs = append(errs, l.file.Release())
	}
	return errors.Join(errs...)
}

// release gives up a layer, which is written or not.
func (l *Layer) release(written bool) error {
	if written && l.image != nil {
		if err := l.image.Freeze(); err != nil {
			return err
		}
	}
	return l.file.Release()
}

// DropCache lets the host forget what it has of the top in its page cache: of
// the only layer that somebody else may have written meanwhile.
func (c *Chain) DropCache() error { return c.top().file.DropCache() }
