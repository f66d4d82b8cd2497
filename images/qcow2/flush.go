package qcow2

import (
	"maps"
	"slices"
)

// piece is metadata on its way to the file.
type piece struct {
	offset int64
	data   []byte
}

// batch is a consistent look at all metadata that waits for being written.
type batch struct {
	pages  []*page
	pieces [phases][]piece
	refs   map[int]uint64 // entries of the refcount table
	l1     map[int]uint64 // entries of the L1 table
	freed  []reference
}

// Flush makes stable what was written before.
func (f *File) Flush() error {
	if f.Clean() {
		return f.s.Flush()
	}
	f.flushing.Lock()
	defer f.flushing.Unlock()
	return f.flush()
}

// Clean reports that a flush of the file makes stable all that was written
// before: no metadata waits for being written.
func (f *File) Clean() bool {
	// In this order: busy is set before unflushed is cleared, and cleared when
	// all is stable.
	return !f.unflushed.Load() && !f.busy.Load()
}

// flush writes all metadata. Preconditions: flushing is held.
func (f *File) flush() error {
	f.busy.Store(true)
	defer f.busy.Store(false)
	if !f.marked.Load() {
		// Stable before anything can leak, so that it is found.
		if err := f.setDirtyBit(true); err != nil {
			return err
		}
		if err := f.s.Flush(); err != nil {
			return err
		}
	}
	b := f.collect()
	if err := f.write(b); err != nil {
		f.giveBack(b)
		return err
	}
	f.settle(b)
	return f.reclaim()
}

// collect takes what is to be written, as it is at this moment.
func (f *File) collect() *batch {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.unflushed.Store(false)
	b := &batch{refs: map[int]uint64{}, l1: map[int]uint64{}, freed: f.freed}
	f.freed = nil
	for i := range f.dirtyRT {
		b.refs[i] = f.refs[i]
	}
	for i := range f.dirtyL1 {
		b.l1[i] = f.l1[i]
	}
	clear(f.dirtyRT)
	clear(f.dirtyL1)
	if f.pages.dirty == 0 {
		return b
	}
	for _, p := range f.pages.clock {
		if !p.dirty {
			continue
		}
		b.pages = append(b.pages, p)
		b.pieces[p.phase] = append(b.pieces[p.phase], piece{p.offset, slices.Clone(p.data)})
		p.dirty, p.writing = false, true
	}
	f.pages.dirty = 0
	return b
}

// write writes a batch in its order.
func (f *File) write(b *batch) error {
	if len(b.pieces[phaseNewBlock]) > 0 {
		if err := f.writePieces(b.pieces[phaseNewBlock]); err != nil {
			return err
		}
		if err := f.s.Flush(); err != nil {
			return err
		}
	}
	if err := f.writeWords(b.refs, f.h.refOffset); err != nil {
		return err
	}
	if err := f.writePieces(b.pieces[phaseCounts]); err != nil {
		return err
	}
	if len(b.pieces[phaseMapping]) > 0 || len(b.l1) > 0 {
		if err := f.s.Flush(); err != nil {
			return err
		}
		if err := f.writePieces(b.pieces[phaseMapping]); err != nil {
			return err
		}
		if err := f.writeWords(b.l1, f.h.l1Offset); err != nil {
			return err
		}
	}
	return f.s.Flush()
}

// writePieces writes pieces, neighbours together.
func (f *File) writePieces(pieces []piece) error {
	slices.SortFunc(pieces, func(a, b piece) int { return int(min(1, max(-1, a.offset-b.offset))) })
	for i := 0; i < len(pieces); {
		data, at := pieces[i].data, pieces[i].offset
		for i++; i < len(pieces) && pieces[i].offset == at+int64(len(data)); i++ {
			data = append(data, pieces[i].data...)
		}
		if err := f.s.WriteBuffered(data, at); err != nil {
			return err
		}
	}
	return nil
}

// writeWords writes entries of a table.
func (f *File) writeWords(words map[int]uint64, table int64) error {
	for _, i := range slices.Sorted(maps.Keys(words)) {
		if err := writeWord(f.s, words[i], table+8*int64(i)); err != nil {
			return err
		}
	}
	return nil
}

// giveBack makes everything wait again after a failure.
func (f *File) giveBack(b *batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range b.refs {
		f.dirtyRT[i] = struct{}{}
	}
	for i := range b.l1 {
		f.dirtyL1[i] = struct{}{}
	}
	for _, p := range b.pages {
		p.writing = false
		f.pages.touch(p)
	}
	f.freed = append(b.freed, f.freed...)
	f.unflushed.Store(true)
}

// settle ends a batch that is stable.
func (f *File) settle(b *batch) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range b.pages {
		p.writing = false
		p.phase = p.kind.phase()
	}
	if len(b.freed) == 0 {
		return
	}
	if len(f.limbo.refs) > 0 {
		f.freed = append(f.freed, b.freed...) // behind those that wait
		f.unflushed.Store(true)
		return
	}
	epoch := f.epoch.Load()
	f.limbo = limbo{refs: b.freed, parity: epoch & 1}
	f.epoch.Store(epoch + 1)
}

// reclaim frees what is in limbo, unless I/O that may have followed the
// references is still in flight. Preconditions: flushing is held.
func (f *File) reclaim() error {
	f.mu.Lock()
	refs := f.limbo.refs
	if len(refs) == 0 || f.pins[f.limbo.parity].Load() != 0 {
		if len(refs) > 0 {
			f.unflushed.Store(true) // look again
		}
		f.mu.Unlock()
		return nil
	}
	f.limbo.refs = nil
	f.mu.Unlock()
	slices.SortFunc(refs, func(a, b reference) int { return int(min(1, max(-1, a.cluster-b.cluster))) })
	if err := f.punch(refs); err != nil {
		return err
	}
	for _, r := range refs {
		err := f.transact(func() error {
			err := f.addCount(r.cluster, -1)
			if err == nil {
				f.cursor = min(f.cursor, r.cluster)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// punch gives the storage of clusters back that lose their last reference.
func (f *File) punch(refs []reference) error {
	cs := f.h.ClusterSize()
	var row span
	give := func() error {
		if row.end == row.start {
			return nil
		}
		return f.s.Discard(row.start*cs, (row.end-row.start)*cs)
	}
	for i := 0; i < len(refs); {
		c, n := refs[i].cluster, uint64(0)
		for ; i < len(refs) && refs[i].cluster == c; i++ {
			n++
		}
		last := false
		err := f.transact(func() error {
			if c >= f.covered() {
				return nil
			}
			p, at, err := f.counts(c)
			last = err == nil && p != nil && refcountAt(p.data, at, f.h.refcountOrder) == n
			return err
		})
		if err != nil {
			return err
		}
		if !last {
			continue
		}
		if c != row.end {
			if err := give(); err != nil {
				return err
			}
			row.start = c
		}
		row.end = c + 1
	}
	return give()
}
