package bench

import (
	"bytes"
	"context"
	"errors"
	"sort"
	"sync"
	"time"
)

// errEnded says that a program ended before it wrote what was waited for.
var errEnded = errors.New("the program ended")

// console is everything a program wrote, with the time each piece was read.
type console struct {
	mu      sync.Mutex
	buf     []byte
	marks   []mark
	ended   bool
	changed chan struct{} // closed and replaced at every change
}

// mark says that buf[:end] had been read at a time.
type mark struct {
	end int
	at  time.Time
}

// maxConsoleBytes bounds what is kept; a program that writes more is cut off.
const maxConsoleBytes = 8 << 20

func newConsole() *console { return &console{changed: make(chan struct{})} }

func (c *console) add(p []byte, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.buf)+len(p) > maxConsoleBytes {
		return
	}
	c.buf = append(c.buf, p...)
	c.marks = append(c.marks, mark{len(c.buf), at})
	c.notify()
}

func (c *console) end() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	c.notify()
}

// notify wakes those who wait. Preconditions: mu is held.
func (c *console) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// find waits for marker behind offset from. It returns the offset behind the
// marker and when its last byte was read.
func (c *console) find(ctx context.Context, from int, marker string) (int, time.Time, error) {
	for {
		c.mu.Lock()
		if i := bytes.Index(c.buf[min(from, len(c.buf)):], []byte(marker)); i >= 0 {
			end := from + i + len(marker)
			k := sort.Search(len(c.marks), func(k int) bool { return c.marks[k].end >= end })
			at := c.marks[k].at
			c.mu.Unlock()
			return end, at, nil
		}
		ended, changed := c.ended, c.changed
		c.mu.Unlock()
		if ended {
			return 0, time.Time{}, errEnded
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return 0, time.Time{}, context.Cause(ctx)
		}
	}
}

// slice returns a copy of the output between two offsets.
func (c *console) slice(from, to int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf[min(from, len(c.buf)):min(to, len(c.buf))])
}

// last returns the last n bytes.
func (c *console) last(n int) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return string(c.buf[max(0, len(c.buf)-n):])
}

// size returns how much has been written.
func (c *console) size() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.buf)
}
