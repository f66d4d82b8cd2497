package qcow2

import (
	"encoding/binary"
	"fmt"

	"golang.org/x/sys/unix"

	"ditto.vm/images/disk"
)

// growRefTable makes room for more refcounts. It is rare: in clusters of 64 KiB
// a table of one cluster counts 16 TiB.
func (f *File) growRefTable() error {
	f.flushing.Lock()
	defer f.flushing.Unlock()
	for {
		if err := f.flush(); err != nil {
			return err
		}
		f.mu.Lock()
		if f.cursor < f.covered() {
			f.mu.Unlock()
			return nil // somebody else has
		}
		if len(f.dirtyRT) == 0 {
			break
		}
		f.mu.Unlock()
	}
	defer f.mu.Unlock()
	return f.moveRefTable()
}

// moveRefTable puts a larger refcount table, and the refcount blocks for it,
// behind all clusters that the present one covers, and switches over.
// Preconditions: flushing and mu are held, the latter across I/O because
// nothing may be allocated meanwhile.
func (f *File) moveRefTable() error {
	cs, bb, first := f.h.ClusterSize(), f.h.blockBits(), f.covered()
	table, blocks := 2*int64(f.h.refClusters), int64(1)
	for {
		blocks = (table + blocks + 1<<bb - 1) >> bb
		enough := (table+blocks+1<<bb-1)>>bb <= blocks
		if enough && first+table+blocks < table*cs/8<<bb {
			break
		}
		if enough {
			table++
		}
	}
	if table*cs > maxRefTable || first+table+blocks > f.limit {
		return unix.ENOSPC
	}
	refs := make([]uint64, table*cs/8)
	copy(refs, f.refs)
	b := make([]byte, cs)
	for k := range blocks {
		clear(b)
		for i := range min(1<<bb, table+blocks-k<<bb) {
			setRefcountAt(b, i, f.h.refcountOrder, 1)
		}
		at := (first + k) * cs
		refs[first>>bb+k] = uint64(at)
		if err := f.s.WriteBuffered(b, at); err != nil {
			return err
		}
	}
	at := (first + blocks) * cs
	if err := writeTable(f.s, refs, at); err != nil {
		return err
	}
	if err := f.s.Flush(); err != nil {
		return err
	}
	var head [12]byte // one sector, so old or new
	binary.BigEndian.PutUint64(head[:], uint64(at))
	binary.BigEndian.PutUint32(head[8:], uint32(table))
	if err := f.s.WriteBuffered(head[:], offRefOffset); err != nil {
		return err
	}
	if err := f.s.Flush(); err != nil {
		return err
	}
	f.abandon(f.h.refOffset, int64(f.h.refClusters))
	for k := range blocks + table {
		f.tables[(first+k)*cs] = struct{}{}
	}
	f.refs, f.h.refOffset, f.h.refClusters = refs, at, int(table)
	f.high = max(f.high, first+blocks+table)
	return nil
}

// abandon frees the clusters of a table that is used no more. Preconditions:
// mu is held.
func (f *File) abandon(offset, clusters int64) {
	for k := range clusters {
		at := offset + k*f.h.ClusterSize()
		delete(f.tables, at)
		f.freed = append(f.freed, reference{at >> f.h.ClusterBits})
	}
	f.unflushed.Store(true)
}

// Resize makes the disk longer. What is new reads as zeros.
func (f *File) Resize(size int64) error {
	old := f.Size()
	switch {
	case !f.writable.Load():
		return errReadOnly
	case size%disk.SectorSize != 0:
		return refusal("round it up", "a size of %d bytes is not a multiple of %d", size, disk.SectorSize)
	case size < old:
		return refusal("stop the machine and use 'qemu-img resize --shrink'", "cannot shrink from %d to %d bytes", old, size)
	}
	if need := f.h.l1Needed(size); need > int64(len(f.l1)) {
		if need*8 > maxL1Bytes {
			return refusal("use larger clusters", "cannot be as large as %d bytes in clusters of %d", size, f.h.ClusterSize())
		}
		if err := f.growL1(need); err != nil {
			return fmt.Errorf("grow the L1 table: %w", err)
		}
	}
	f.size.Store(size)
	// A backing image may be longer than this one was.
	err := f.WriteZeroes(old, f.backed(old, size-old), true)
	if err == nil {
		err = f.Flush()
	}
	if err == nil {
		f.mu.Lock()
		f.h.Size = size
		err = writeWord(f.s, uint64(size), offSize)
		f.mu.Unlock()
	}
	if err == nil {
		err = f.s.Flush()
	}
	if err != nil {
		f.size.Store(old)
	}
	return err
}

// growL1 moves the L1 table to where it can have n entries.
func (f *File) growL1(n int64) error {
	cs := f.h.ClusterSize()
	clusters := (n*8 + cs - 1) / cs
	r, err := f.allocRow(clusters)
	if err != nil {
		return err
	}
	f.flushing.Lock()
	defer f.flushing.Unlock()
	// Its refcount is stable before it is referenced, and no entry of the old
	// table waits.
	if err := f.flush(); err != nil {
		return err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	l1 := make([]uint64, n)
	copy(l1, f.l1)
	for i := range f.dirtyL1 {
		l1[i] = 0 // since the flush; not referenced before the next one
	}
	padded := append(l1, make([]uint64, clusters*cs/8-n)...)
	if err := writeTable(f.s, padded, r.offset); err != nil {
		return err
	}
	if err := f.s.Flush(); err != nil {
		return err
	}
	var head [12]byte // one sector, so old or new
	binary.BigEndian.PutUint32(head[:], uint32(n))
	binary.BigEndian.PutUint64(head[4:], uint64(r.offset))
	if err := f.s.WriteBuffered(head[:], offL1Size); err != nil {
		return err
	}
	if err := f.s.Flush(); err != nil {
		return err
	}
	copy(l1, f.l1)
	f.abandon(f.h.l1Offset, (int64(len(f.l1))*8+cs-1)/cs)
	for k := range clusters {
		f.tables[r.offset+k*cs] = struct{}{}
	}
	f.l1, f.h.l1Offset, f.h.l1Entries = l1, r.offset, int(n)
	return nil
}

// allocRow allocates exactly n clusters in a row.
func (f *File) allocRow(n int64) (run, error) {
	if n > f.perPage()/2 {
		return run{}, refusal("stop the machine and use 'qemu-img resize'", "its clusters of %d bytes are too small", f.h.ClusterSize())
	}
	f.mu.Lock()
	low := f.cursor
	f.cursor = max(low, f.high)
	f.mu.Unlock()
	var parts []run
	r, err := f.alloc(n)
	for err == nil && r.n < n {
		parts = append(parts, r)
		r, err = f.alloc(n)
	}
	for _, p := range parts {
		if e := f.unalloc(p); err == nil {
			err = e
		}
	}
	f.mu.Lock()
	f.cursor = min(low, f.cursor)
	f.mu.Unlock()
	return r, err
}
