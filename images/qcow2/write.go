package qcow2

import "bytes"

// maxAlloc bounds how much of a write is allocated at once, in bytes.
const maxAlloc = 4 << 20

// WriteAtv writes bufs at offset. The data are stable after the next Flush.
func (f *File) WriteAtv(bufs [][]byte, offset int64) error {
	left := length(bufs)
	if err := f.check(offset, left, true); err != nil {
		return err
	}
	for left > 0 {
		n, err := f.writePart(bufs, offset, left)
		if err != nil {
			return err
		}
		bufs = drop(bufs, n)
		offset, left = offset+n, left-n
	}
	return nil
}

// writePart writes the beginning of bufs, which hold left bytes, and returns
// how much.
func (f *File) writePart(bufs [][]byte, offset, left int64) (int64, error) {
	e, done, err := f.writeInPlace(bufs, offset, left)
	if done || err != nil {
		return e.Length, err
	}
	if f.full() {
		if err := f.Flush(); err != nil {
			return 0, err
		}
	}
	return f.writeNew(bufs, offset, e.Length)
}

// full reports that enough metadata waits for being written.
func (f *File) full() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return int64(f.pages.dirty)*f.pages.size > maxDirtyBytes
}

// writeInPlace writes the extent at offset if that needs no allocation.
func (f *File) writeInPlace(bufs [][]byte, offset, left int64) (e Extent, done bool, err error) {
	pin := f.Begin()
	defer f.End(pin)
	e, err = f.Map(offset, left)
	if err != nil || e.Kind != Data || !e.InPlace {
		return e, false, err
	}
	return e, true, f.s.WriteAtv(take(bufs, e.Length), e.Host)
}

// writeNew writes up to n bytes of bufs to new clusters, together with what
// else is in these clusters, and returns how many.
func (f *File) writeNew(bufs [][]byte, offset, n int64) (int64, error) {
	cs := f.h.ClusterSize()
	start := offset &^ (cs - 1)
	n = min(n, start+max(maxAlloc, cs)-offset)
	held := span{start, (offset + n + cs - 1) &^ (cs - 1)}
	f.ranges.lock(held)
	defer f.ranges.unlock(held)
	e, done, err := f.writeInPlace(bufs, offset, n)
	if done || err != nil {
		return e.Length, err // somebody else has allocated it
	}
	if e, err = f.Map(start, min(held.end, f.Size())-start); err != nil {
		return 0, err
	}
	if err := f.ensureTable(start); err != nil {
		return 0, err
	}
	r := run{offset: e.Host, n: (e.Length + cs - 1) / cs}
	reuse := e.Kind == Zero && e.InPlace
	if !reuse {
		if r, err = f.alloc(r.n); err != nil {
			return 0, err
		}
	}
	n = min(n, start+r.n*cs-offset)
	if err = f.fill(take(bufs, n), offset, n, e, r); err == nil {
		err = f.transact(func() error { return f.setEntries(start, r.n, r.offset, flagCopied) })
	}
	if err != nil && !reuse {
		// The first error is what counts; at worst clusters leak.
		_ = f.unalloc(r)
	}
	if err != nil {
		return 0, err
	}
	return n, nil
}

// fill writes n bytes of the disk at offset to new clusters, and what the disk
// shows before and behind them in the same clusters.
func (f *File) fill(bufs [][]byte, offset, n int64, e Extent, r run) error {
	cs := f.h.ClusterSize()
	before := offset & (cs - 1)
	after := r.n*cs - before - n
	// One vector, unless there is nothing to be kept.
	var vector [][]byte
	at := r.offset + before
	head, err := f.keep(offset-before, before, e, r.fresh)
	if err != nil {
		return err
	}
	tail, err := f.keep(offset+n, after, e, r.fresh)
	if err != nil {
		return err
	}
	if head != nil {
		at, vector = r.offset, append(vector, head)
	}
	vector = append(vector, bufs...)
	if tail != nil {
		vector = append(vector, tail)
	}
	return f.s.WriteAtv(vector, at)
}

// keep reads n bytes of the disk that are to be written again; nil if the new
// clusters hold them already, because both are zeros.
func (f *File) keep(offset, n int64, e Extent, fresh bool) ([]byte, error) {
	if n == 0 {
		return nil, nil
	}
	zeros := e.Kind == Zero || e.Kind == Unallocated && f.backed(offset, n) == 0
	if zeros && fresh {
		return nil, nil
	}
	b := make([]byte, n)
	if zeros {
		return b, nil
	}
	inside := b[:min(n, max(0, f.Size()-offset))]
	if err := f.ReadAtv([][]byte{inside}, offset); err != nil {
		return nil, err
	}
	if fresh && isZero(b) {
		return nil, nil
	}
	return b, nil
}

var zeros [4096]byte

func isZero(b []byte) bool {
	for len(b) > len(zeros) {
		if !bytes.Equal(b[:len(zeros)], zeros[:]) {
			return false
		}
		b = b[len(zeros):]
	}
	return bytes.Equal(b, zeros[:len(b)])
}
