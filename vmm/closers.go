package vmm

import "errors"

// closers undoes what was opened, last first, and each of it once.
type closers struct{ stack []func() error }

func (c *closers) add(f func() error) { c.stack = append(c.stack, f) }

func (c *closers) close() error {
	var errs []error
	for n := len(c.stack) - 1; n >= 0; n-- {
		errs = append(errs, c.stack[n]())
	}
	c.stack = nil
	return errors.Join(errs...)
}
