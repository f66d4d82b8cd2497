package qcow2

// Discard says that the content of a range is not needed: the clusters in it
// are freed and read as zeros. Parts of clusters stay as they are, and so does
// what is in the backing image only.
func (f *File) Discard(offset, n int64) error {
	if err := f.check(offset, n, true); err != nil {
		return err
	}
	if f.h.Version < 3 && f.backing != nil {
		return nil // it cannot say that the backing image is hidden
	}
	cs := f.h.ClusterSize()
	end := f.wholeEnd(offset + n)
	offset = (offset + cs - 1) &^ (cs - 1)
	return f.eraseClusters(offset, end, func(e Extent, at, n int64) error {
		if e.Kind == Unallocated || e.Kind == Zero && e.Host == 0 {
			return nil
		}
		return f.transact(func() error { return f.setEntries(at, n, 0, f.zeroFlag()) })
	})
}

// zeroFlag is the entry of a cluster of zeros without storage.
func (f *File) zeroFlag() uint64 {
	if f.h.Version < 3 {
		return 0
	}
	return flagZero
}

// wholeEnd rounds an end down to whole clusters; the last cluster of the disk
// is whole even if the disk ends in it.
func (f *File) wholeEnd(end int64) int64 {
	cs := f.h.ClusterSize()
	if end == f.Size() {
		return (end + cs - 1) &^ (cs - 1)
	}
	return end &^ (cs - 1)
}

// eraseClusters calls change for every extent of the clusters in [offset, end),
// with the number of its clusters, while no other changes them.
func (f *File) eraseClusters(offset, end int64, change func(e Extent, at, n int64) error) error {
	cs := f.h.ClusterSize()
	for offset < end {
		if f.full() {
			if err := f.Flush(); err != nil {
				return err
			}
		}
		s := span{offset, min(end, offset+max(maxAlloc, cs))}
		n, err := f.eraseSpan(s, change)
		if err != nil {
			return err
		}
		offset += n * cs
	}
	return nil
}

func (f *File) eraseSpan(s span, change func(e Extent, at, n int64) error) (n int64, err error) {
	f.ranges.lock(s)
	defer f.ranges.unlock(s)
	e, err := f.Map(s.start, min(s.end, f.Size())-s.start)
	if err != nil {
		return 0, err
	}
	cs := f.h.ClusterSize()
	n = (e.Length + cs - 1) / cs
	return n, change(e, s.start, n)
}

// WriteZeroes makes a range read as zeros. With unmap the storage of whole
// clusters is given back, without it stays theirs.
func (f *File) WriteZeroes(offset, n int64, unmap bool) error {
	if err := f.check(offset, n, true); err != nil {
		return err
	}
	cs := f.h.ClusterSize()
	end := offset + n
	first, last := (offset+cs-1)&^(cs-1), f.wholeEnd(end)
	if first >= last {
		return f.zeroPart(offset, n)
	}
	if err := f.zeroPart(offset, first-offset); err != nil {
		return err
	}
	err := f.eraseClusters(first, last, func(e Extent, at, n int64) error { return f.zeroClusters(e, at, n, unmap) })
	if err != nil || last >= end {
		return err
	}
	return f.zeroPart(last, end-last)
}

// zeroPart writes zeros, except where there are some. The range is less than
// two clusters.
func (f *File) zeroPart(offset, n int64) error {
	for n > 0 {
		e, err := f.Map(offset, n)
		if err != nil {
			return err
		}
		if e.Kind == Data || e.Kind == Compressed || e.Kind == Unallocated && f.backed(offset, e.Length) > 0 {
			if err := f.WriteAtv([][]byte{make([]byte, e.Length)}, offset); err != nil {
				return err
			}
		}
		offset, n = offset+e.Length, n-e.Length
	}
	return nil
}

// zeroClusters makes n clusters at offset read as zeros, which are one extent
// that is locked.
func (f *File) zeroClusters(e Extent, offset, n int64, unmap bool) error {
	keep := !unmap && (e.Kind == Data || e.Kind == Zero) && e.InPlace
	switch {
	case e.Kind == Unallocated && f.backed(offset, e.Length) == 0:
		return nil
	case e.Kind == Zero && (keep || e.Host == 0):
		return nil
	case f.h.Version < 3 && (keep || f.backing != nil):
		return f.zeroOld(e, offset, n)
	}
	if err := f.ensureTable(offset); err != nil {
		return err
	}
	return f.transact(func() error {
		if keep {
			return f.setEntries(offset, n, e.Host, flagCopied|flagZero)
		}
		return f.setEntries(offset, n, 0, f.zeroFlag())
	})
}

// zeroOld writes zeros where version 2 of the format has no other way. The
// clusters are locked.
func (f *File) zeroOld(e Extent, offset, n int64) error {
	cs := f.h.ClusterSize()
	b := make([]byte, cs)
	if e.Kind == Data && e.InPlace {
		for k := range n {
			if err := f.s.WriteAtv([][]byte{b}, e.Host+k*cs); err != nil {
				return err
			}
		}
		return nil
	}
	if err := f.ensureTable(offset); err != nil {
		return err
	}
	for k := range n {
		r, err := f.alloc(1)
		if err != nil {
			return err
		}
		if err = f.s.WriteAtv([][]byte{b}, r.offset); err == nil {
			err = f.transact(func() error { return f.setEntries(offset+k*cs, 1, r.offset, flagCopied) })
		}
		if err != nil {
			_ = f.unalloc(r) // the first error is what counts
			return err
		}
	}
	return nil
}
