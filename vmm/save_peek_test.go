package vmm

import (
	"errors"
	"testing"

	"ditto.vm/memory"
)

// peekTracker knows when a save is at which step: it collects to see what is
// written while the guest runs, and peeks in the pause.
type peekTracker struct {
	memory.Tracker
	space *memory.Space
	// rearm is called before each collection of the lowest region while the
	// guest runs, with its number; 0 arms.
	rearm func(n int)
	peek  func()        // likewise, in the pause
	dump  *memory.Space // of memory in the pause
	n     int
	err   error
}

func (p *peekTracker) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	if r.Start == 0 && mode == memory.Rearm {
		if p.rearm != nil {
			p.rearm(p.n)
		}
		p.n++
	}
	if r.Start == 0 && mode == memory.Peek {
		if p.peek != nil {
			p.peek()
		}
		if p.dump != nil { // another looked too
			p.err = p.dump.Close()
		}
		if p.dump, p.err = memory.New(memory.Config{Size: p.space.Size(), HugePages: memory.HugePagesOff}); p.err == nil {
			p.err = copyOf(p.space)(p.dump)
		}
	}
	return errors.Join(p.err, p.Tracker.Collect(r, into, mode))
}

// takeDump returns what memory was in the pause, until the end of the test.
func (p *peekTracker) takeDump(t *testing.T) *memory.Space {
	t.Helper()
	if p.dump == nil {
		t.Fatal("memory was not collected in a pause")
	}
	d := p.dump
	p.dump, p.n = nil, 0
	t.Cleanup(func() { d.Close() })
	return d
}
