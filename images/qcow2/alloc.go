package qcow2

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// run is a row of clusters that were just allocated.
type run struct {
	offset int64 // in the file
	n      int64 // clusters
	fresh  bool  // nobody ever wrote them: they read as zeros
}

// errTableFull: the refcount table must grow first.
var errTableFull = errors.New("refcount table is full")

// alloc allocates up to n clusters in a row, at least one.
func (f *File) alloc(n int64) (r run, err error) {
	for {
		err = f.transact(func() error {
			r, err = f.find(n)
			return err
		})
		if !errors.Is(err, errTableFull) {
			return r, err
		}
		if err := f.growRefTable(); err != nil {
			return r, fmt.Errorf("grow the refcount table: %w", err)
		}
	}
}

// find takes the first free clusters. Preconditions: mu is held.
func (f *File) find(n int64) (run, error) {
	if f.broken != nil {
		return run{}, f.broken
	}
	bb, order := f.h.blockBits(), f.h.refcountOrder
	for {
		c := f.cursor
		switch {
		case c >= f.limit:
			return run{}, fmt.Errorf("qcow2 image: %w", unix.ENOSPC)
		case c >= f.covered():
			return run{}, errTableFull
		case f.refs[c>>bb] == 0:
			if err := f.newBlock(c); err != nil {
				return run{}, err
			}
			continue
		}
		p, i, err := f.counts(c)
		if err != nil {
			return run{}, err
		}
		end := min(f.perPage(), i+f.limit-c, i+1<<bb-c&(1<<bb-1))
		first := i
		for first < end && refcountAt(p.data, first, order) != 0 {
			first++
		}
		f.cursor += first - i
		if first == end {
			continue
		}
		last := first
		for last < min(end, first+n) && refcountAt(p.data, last, order) == 0 {
			last++
		}
		return f.occupy(p, first, last)
	}
}

// occupy counts the clusters from the cursor on, whose refcounts are those in
// p. Preconditions: mu is held.
func (f *File) occupy(p *page, first, last int64) (run, error) {
	cs := f.h.ClusterSize()
	r := run{offset: f.cursor * cs, n: last - first, fresh: f.cursor >= f.high && f.s.Growable()}
	for c := range r.n {
		if _, ok := f.tables[r.offset+c*cs]; ok {
			return run{}, f.damaged(corrupt("metadata at %#x has a refcount of zero", r.offset+c*cs))
		}
	}
	for ; first < last; first++ {
		setRefcountAt(p.data, first, f.h.refcountOrder, 1)
	}
	f.touch(p)
	f.cursor += r.n
	f.high = max(f.high, f.cursor)
	return r, nil
}

// newBlock makes a cluster the refcount block for itself and its neighbours,
// none of which has one. Preconditions: mu is held.
func (f *File) newBlock(c int64) error {
	cs, bb := f.h.ClusterSize(), f.h.blockBits()
	at := c * cs
	if _, ok := f.tables[at]; ok {
		return f.damaged(corrupt("metadata at %#x has no refcount", at))
	}
	i := c & (1<<bb - 1)
	f.pages.zeros(at, cs, at+i<<f.h.refcountOrder>>3, pageCounts, phaseNewBlock, c < f.high || !f.s.Growable())
	f.refs[c>>bb] = uint64(at)
	f.dirtyRT[int(c>>bb)] = struct{}{}
	f.tables[at] = struct{}{}
	f.cursor, f.high = c+1, max(f.high, c+1)
	return f.addCount(c, 1)
}

// unalloc takes an allocation back that nothing has referenced yet.
func (f *File) unalloc(r run) error {
	cs := f.h.ClusterSize()
	for c := range r.n {
		cluster := r.offset/cs + c
		err := f.transact(func() error {
			err := f.addCount(cluster, -1)
			if err == nil {
				f.cursor = min(f.cursor, cluster)
			}
			return err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// ensureTable makes the L2 table that covers offset of the disk.
func (f *File) ensureTable(offset int64) error {
	i := offset >> (f.h.ClusterBits + f.h.l2Bits())
	f.mu.Lock()
	there := f.l1[i]&offsetMask != 0
	f.mu.Unlock()
	if there {
		return nil
	}
	r, err := f.alloc(1)
	if err != nil {
		return err
	}
	f.mu.Lock()
	if f.l1[i]&offsetMask != 0 { // somebody was faster
		f.mu.Unlock()
		return f.unalloc(r)
	}
	defer f.mu.Unlock()
	at := r.offset + offset>>f.h.ClusterBits&(1<<f.h.l2Bits()-1)*8
	f.pages.zeros(r.offset, f.h.ClusterSize(), at, pageMapping, phaseCounts, !r.fresh)
	f.tables[r.offset] = struct{}{}
	f.l1[i] = uint64(r.offset) | flagCopied
	f.dirtyL1[int(i)] = struct{}{}
	f.unflushed.Store(true)
	return nil
}

// reference is one reference to a cluster of the file.
type reference struct{ cluster int64 }

// release notes that what entry references is referenced no more, as soon as
// the next flush is through. Preconditions: mu is held.
func (f *File) release(entry uint64) {
	at, n := int64(entry&offsetMask), f.h.ClusterSize()
	if entry&flagCompressed != 0 {
		at, n = f.h.compressedRange(entry)
	} else if at == 0 {
		return
	}
	cb := f.h.ClusterBits
	for c := at >> cb; c <= (at+n-1)>>cb; c++ {
		f.freed = append(f.freed, reference{c})
	}
}

// setEntries gives n clusters of the disk new L2 entries: they are at host in
// the file, one after the other, or all have the entry flags alone if host is
// 0. What was there before is released, unless it stays. Preconditions: mu is
// held, the L2 entries are in one page.
func (f *File) setEntries(offset, n, host int64, flags uint64) error {
	p, i, err := f.position(offset)
	if err != nil {
		return err
	}
	for k := range n {
		entry := flags
		if host != 0 {
			entry |= uint64(host + k*f.h.ClusterSize())
		}
		old := p.word(i + k)
		if old&flagCompressed != 0 || old&offsetMask != entry&offsetMask {
			f.release(old)
		}
		p.setWord(i+k, entry)
	}
	f.touch(p)
	return nil
}
