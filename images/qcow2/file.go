package qcow2

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"ditto.vm/images/disk"
)

// Backing is what an image shows where it has nothing of its own.
type Backing interface {
	ReadAtv(bufs [][]byte, offset int64) error
	// Size in bytes. Beyond it the image shows zeros.
	Size() int64
}

// File is an open image. Its Storage belongs to who opened it, and is closed
// after it.
type File struct {
	s       Storage
	h       Header
	backing Backing
	size    atomic.Int64

	mu      sync.Mutex // guards what follows
	pages   pageCache
	loading map[int64]chan struct{}
	l1      []uint64
	refs    []uint64           // the refcount table
	tables  map[int64]struct{} // clusters that hold metadata; nil when read-only
	dirtyL1 map[int]struct{}   // entries to be written
	dirtyRT map[int]struct{}
	cursor  int64 // clusters below it are in use
	high    int64 // clusters from it on were never used
	limit   int64 // clusters the storage can hold
	freed   []reference
	limbo   limbo
	broken  error // writing is over

	writable  atomic.Bool
	marked    atomic.Bool // the dirty bit is set in the file
	unflushed atomic.Bool // there is metadata to write
	busy      atomic.Bool // a flush is writing metadata
	flushing  sync.Mutex  // one Flush at a time; taken before mu
	ranges    ranges
	epoch     atomic.Uint64
	pins      [2]atomic.Int64
	clusters  clusterCache
}

// Options say how to open an image.
type Options struct {
	ReadOnly bool
}

// Open reads the image in s. What a user can get wrong is a [*disk.Error]
// without a path. An image that was not closed properly is searched for leaked
// clusters if it may be written.
func Open(s Storage, o Options) (*File, error) {
	h, err := ReadHeader(s)
	if err != nil {
		return nil, err
	}
	if int64(s.BlockSize()) > h.ClusterSize() {
		return nil, refusal("use cache mode writeback", "its clusters of %d bytes are smaller than blocks of %d", h.ClusterSize(), s.BlockSize())
	}
	f := &File{
		s: s, h: *h, pages: newPageCache(h.ClusterSize()), loading: map[int64]chan struct{}{},
		dirtyL1: map[int]struct{}{}, dirtyRT: map[int]struct{}{},
	}
	f.writable.Store(!o.ReadOnly)
	f.size.Store(h.Size)
	f.ranges.changed.L = &f.ranges.mu
	if f.l1, err = readTable(s, h.l1Offset, h.l1Entries); err != nil {
		return nil, unreadable(err)
	}
	for i, e := range f.l1 {
		if e&l1Reserved != 0 || e&uint64(h.ClusterSize()-1)&offsetMask != 0 {
			return nil, refusal(cureDamaged, "entry %d of its L1 table, %#x, is invalid", i, e)
		}
	}
	if f.writable.Load() {
		if err := f.openWritable(); err != nil {
			return nil, err
		}
	}
	return f, nil
}

func unreadable(err error) error {
	return &disk.Error{Err: err, Reason: "cannot be read: " + err.Error(), Cure: "check the file system and the device"}
}

// ReadHeader reads and checks the header of the image in s.
func ReadHeader(s Storage) (*Header, error) {
	length, err := s.Length()
	if err != nil {
		return nil, unreadable(err)
	}
	b := make([]byte, min(length, maxHeaderBytes))
	if err := s.ReadBuffered(b, 0); err != nil {
		return nil, unreadable(err)
	}
	return parseHeader(b, length)
}

// openWritable reads what is needed for allocating clusters.
func (f *File) openWritable() error {
	if err := f.h.checkWritable(); err != nil {
		return err
	}
	length, err := f.s.Length()
	if err != nil {
		return unreadable(err)
	}
	cs := f.h.ClusterSize()
	n := int64(f.h.refClusters) * cs / 8
	if f.refs, err = readTable(f.s, f.h.refOffset, int(n)); err != nil {
		return unreadable(err)
	}
	f.high = (length + cs - 1) / cs
	f.limit = 1 << (56 - f.h.ClusterBits)
	if !f.s.Growable() {
		f.limit = length / cs
	}
	if err := f.findTables(); err != nil {
		return err
	}
	if f.h.Dirty {
		return f.recoverCounts()
	}
	return nil
}

// findTables notes which clusters hold metadata, so that no entry can turn
// guest data into metadata.
func (f *File) findTables() error {
	f.tables = map[int64]struct{}{}
	cs := f.h.ClusterSize()
	note := func(offset, n int64, what string) error {
		for at := offset; at < offset+n; at += cs {
			if _, ok := f.tables[at]; ok {
				return refusal(cureDamaged, "its %s at %#x overlaps other metadata", what, offset)
			}
			f.tables[at] = struct{}{}
		}
		return nil
	}
	err := errors.Join(note(0, cs, "header"), note(f.h.l1Offset, int64(len(f.l1))*8, "L1 table"),
		note(f.h.refOffset, int64(f.h.refClusters)*cs, "refcount table"))
	for i := 0; i < len(f.refs) && err == nil; i++ {
		e := f.refs[i]
		if e&^offsetMask != 0 || e&uint64(cs-1) != 0 {
			return refusal(cureDamaged, "entry %d of its refcount table, %#x, is invalid", i, e)
		}
		if e != 0 {
			err = note(int64(e), cs, "refcount block")
		}
	}
	for i := 0; i < len(f.l1) && err == nil; i++ {
		e := f.l1[i]
		if e&offsetMask == 0 {
			continue
		}
		if e&flagCopied == 0 {
			return refusal("repair it with 'qemu-img check -r all'", "shares L2 tables although it has no snapshots")
		}
		err = note(int64(e&offsetMask), cs, "L2 table")
	}
	return err
}

// Header returns what the image says of itself.
func (f *File) Header() Header {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.h
}

// SetBacking attaches the backing image. Call it before anything is read.
func (f *File) SetBacking(b Backing) { f.backing = b }

// Size is the length of the disk in bytes.
func (f *File) Size() int64 { return f.size.Load() }

// ReadOnly reports that writes fail.
func (f *File) ReadOnly() bool { return !f.writable.Load() }

// errReadOnly is a write to an image that was opened for reading.
var errReadOnly = errors.New("qcow2 image is open for reading only")

// check refuses accesses beyond the end, and writes that cannot be.
func (f *File) check(offset, n int64, write bool) error {
	if offset < 0 || n < 0 || offset > f.Size()-n {
		return fmt.Errorf("%d bytes at %#x are not in the disk of %d bytes", n, offset, f.Size())
	}
	if !write {
		return nil
	}
	if !f.writable.Load() {
		return errReadOnly
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.broken
}

// transact runs op under the mutex. An op that misses a page must have changed
// nothing; it is run again when the page is there.
func (f *File) transact(op func() error) error {
	for {
		f.mu.Lock()
		err := op()
		f.mu.Unlock()
		m, miss := err.(missing) // never wrapped
		if !miss {
			return err
		}
		if err := f.load(m); err != nil {
			return err
		}
	}
}

// load brings a page into memory, or waits until somebody else has.
func (f *File) load(m missing) error {
	f.mu.Lock()
	if wait, ok := f.loading[m.offset]; ok {
		f.mu.Unlock()
		<-wait
		return nil
	}
	done := make(chan struct{})
	f.loading[m.offset] = done
	f.mu.Unlock()
	data := make([]byte, f.pages.size)
	err := f.s.ReadBuffered(data, m.offset)
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.loading, m.offset)
	close(done)
	if err != nil {
		return fmt.Errorf("read metadata at %#x: %w", m.offset, err)
	}
	if _, ok := f.pages.byOff[m.offset]; ok {
		return nil
	}
	p := &page{data: data}
	if m.kind == pageMapping {
		for i := range f.pages.size / 8 {
			if err := f.checkTarget(p.word(i)); err != nil {
				return f.damaged(err)
			}
		}
	}
	f.pages.add(m.offset, m.kind, data)
	return nil
}

// checkTarget validates an L2 entry and, if the image is written, that it
// leads to no metadata. Preconditions: mu is held.
func (f *File) checkTarget(e uint64) error {
	if e == 0 {
		return nil
	}
	if err := f.h.checkEntry(e); err != nil {
		return err
	}
	if f.tables == nil || e&flagCompressed != 0 || e&offsetMask == 0 {
		return nil
	}
	if _, ok := f.tables[int64(e&offsetMask)]; ok {
		return corrupt("L2 entry %#x points to metadata", e)
	}
	return nil
}

// damaged ends writing because of what was found, and says so in the file.
// Preconditions: mu is held.
func (f *File) damaged(err error) error {
	if !f.writable.Load() || f.broken != nil {
		return err
	}
	f.broken = err
	if f.h.Version >= 3 {
		f.h.incompatible |= featureCorrupt
		// The error itself is what counts.
		_ = writeWord(f.s, f.h.incompatible, offIncompatible)
	}
	return err
}

// Close flushes. The image is marked as closed properly if it is.
func (f *File) Close() error {
	if !f.writable.Load() {
		return nil
	}
	return f.Freeze()
}

// Freeze flushes all there is and ends writing. Nothing may be in flight.
func (f *File) Freeze() error {
	err := f.Flush()
	// What a flush frees has refcounts to write in turn.
	for range 3 {
		if err == nil && f.unflushed.Load() {
			err = f.Flush()
		}
	}
	if err == nil && f.marked.Load() {
		err = f.setDirtyBit(false)
		if err == nil {
			err = f.s.Flush()
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.writable.Store(false)
	if err == nil {
		err = f.broken
	}
	return err
}

// Thaw lets a frozen image be written again. Nobody else may have written it.
func (f *File) Thaw() { f.writable.Store(true) }

// setDirtyBit changes the dirty bit in the file. Images of version 2 have none.
func (f *File) setDirtyBit(dirty bool) error {
	if f.h.Version < 3 {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.h.incompatible &^= featureDirty
	if dirty {
		f.h.incompatible |= featureDirty
	}
	if err := writeWord(f.s, f.h.incompatible, offIncompatible); err != nil {
		return err
	}
	f.marked.Store(dirty)
	return nil
}

// NextData returns the next range at or after off that this image itself holds
// something for, or io.EOF.
func (f *File) NextData(off int64) (start, end int64, err error) {
	for start = off; start < f.Size(); {
		e, err := f.Map(start, f.Size()-start)
		if err != nil {
			return 0, 0, err
		}
		if e.Kind == Data || e.Kind == Compressed {
			return start, start + e.Length, nil
		}
		start += e.Length
	}
	return 0, 0, io.EOF
}

// limbo are references that are gone from stable storage, until the I/O that
// may have followed them is done.
type limbo struct {
	refs   []reference
	parity uint64
}
