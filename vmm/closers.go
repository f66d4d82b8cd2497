package vmm

import (
	"errors"
	"sync"
)

// closers undoes what was opened, last first, and each of it once.
type closers struct {
	mu    sync.Mutex // guards stack: networks are opened side by side
	stack []func() error
}

func (c *closers) add(f func() error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.stack = append(c.stack, f)
}

func (c *closers) close() error {
	c.mu.Lock()
	stack := c.stack
	c.stack = nil
	c.mu.Unlock()
	var errs []error
	for n := len(stack) - 1; n >= 0; n-- {
		errs = append(errs, stack[n]())
	}
	return errors.Join(errs...)
}
