package namestest_test

import (
	"sync"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/memory"
)

// The mutants of a disk's observer.

// quietRead tells of a read only when it is over.
type quietRead struct{ blk.Observer }

func (o quietRead) BeforeRead(*blk.IO) {}
func (o quietRead) AfterRead(io *blk.IO, err error) {
	o.Observer.BeforeRead(io)
	o.Observer.AfterRead(io, err)
}

// noBeforeWrite does not tell that a write begins.
type noBeforeWrite struct{ blk.Observer }

func (o noBeforeWrite) BeforeWrite(*blk.IO) {}

// quietWrite tells of a write only when it is over.
type quietWrite struct{ blk.Observer }

func (o quietWrite) BeforeWrite(*blk.IO) {}
func (o quietWrite) AfterWrite(io *blk.IO, err error) {
	o.Observer.BeforeWrite(io)
	o.Observer.AfterWrite(io, err)
}

// hastyWrite tells that a write is over when it begins.
type hastyWrite struct{ blk.Observer }

func (o hastyWrite) BeforeWrite(io *blk.IO) {
	o.Observer.BeforeWrite(io)
	o.Observer.AfterWrite(io, nil)
}
func (o hastyWrite) AfterWrite(*blk.IO, error) {}

// noErase does not tell of discards and write-zeroes.
type noErase struct{ blk.Observer }

func (o noErase) BeforeErase(int64, int64)       {}
func (o noErase) AfterErase(int64, int64, error) {}

// hastyErase tells that an erasure is over when it begins.
type hastyErase struct{ blk.Observer }

func (o hastyErase) BeforeErase(offset, n int64) {
	o.Observer.BeforeErase(offset, n)
	o.Observer.AfterErase(offset, n, nil)
}
func (o hastyErase) AfterErase(int64, int64, error) {}

// noResize does not tell that the disk ends elsewhere.
type noResize struct{ blk.Observer }

func (o noResize) Resize(int64) {}

// allDone takes failed requests for done.
type allDone struct{ blk.Observer }

func (o allDone) AfterRead(io *blk.IO, _ error)  { o.Observer.AfterRead(io, nil) }
func (o allDone) AfterWrite(io *blk.IO, _ error) { o.Observer.AfterWrite(io, nil) }

// onceOnly leaves out buffers of pages that stand in a request already.
type onceOnly struct{ blk.Observer }

func (o onceOnly) once(io *blk.IO) *blk.IO {
	seen, cut := map[memory.GPA]bool{}, *io
	cut.Buffers = nil
	for _, b := range io.Buffers {
		if !seen[b.GPA] {
			cut.Buffers = append(cut.Buffers, b)
		}
		seen[b.GPA] = true
	}
	return &cut
}

func (o onceOnly) BeforeRead(io *blk.IO)           { o.Observer.BeforeRead(o.once(io)) }
func (o onceOnly) AfterRead(io *blk.IO, err error) { o.Observer.AfterRead(o.once(io), err) }

// rounded makes parts of pages and blocks whole.
type rounded struct{ blk.Observer }

func (o rounded) round(io *blk.IO) *blk.IO {
	whole := *io
	whole.Offset &^= page - 1
	whole.Buffers = nil
	for _, b := range io.Buffers {
		// Only the length counts for the observer.
		whole.Buffers = append(whole.Buffers, virtio.Buffer{GPA: b.GPA &^ (page - 1), Data: make([]byte, page)})
	}
	return &whole
}

func (o rounded) BeforeRead(io *blk.IO)           { o.Observer.BeforeRead(o.round(io)) }
func (o rounded) AfterRead(io *blk.IO, err error) { o.Observer.AfterRead(o.round(io), err) }

// The mutants of what the Space tells.

// deaf does not hear of what the VMM writes and discards.
type deaf struct{}

func (deaf) HostWrite(memory.GPA, uint64) {}

// onceTold does not hear a report that is the same as the one before.
type onceTold struct {
	memory.WriteObserver

	mu   sync.Mutex // guards last
	last memory.Range
}

func (o *onceTold) HostWrite(gpa memory.GPA, n uint64) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if r := (memory.Range{Start: gpa, Size: n}); r != o.last {
		o.last = r
		o.WriteObserver.HostWrite(gpa, n)
	}
}

// The mutants of the tracker.

// blind collects nothing.
type blind struct{ memory.Tracker }

func (blind) Collect(memory.Range, *memory.PageSet, memory.CollectMode) error { return nil }

// lateArm arms pages only when a vCPU has stored into them: what should be done
// before they are compared with their blocks it does after. Until then nothing is
// written that it could report.
type lateArm struct {
	memory.Tracker

	mu     sync.Mutex // guards what follows
	armed  []memory.Range
	stored bool
}

func (l *lateArm) Arm(r memory.Range) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.armed = append(l.armed, r)
	return nil
}

func (l *lateArm) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.stored {
		return nil
	}
	for _, armed := range l.armed {
		if err := l.Tracker.Arm(armed); err != nil {
			return err
		}
	}
	l.armed = nil
	return l.Tracker.Collect(r, into, mode)
}

// vcpuStored hears that the vCPU has.
func (l *lateArm) vcpuStored() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.stored = true
}
