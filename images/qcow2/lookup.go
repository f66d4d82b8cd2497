package qcow2

// Pin keeps every cluster that a lookup finds from being used for something
// else, until it is given back.
type Pin uint64

// Begin returns a pin. Take it before the lookup.
func (f *File) Begin() Pin {
	for {
		epoch := f.epoch.Load()
		f.pins[epoch&1].Add(1)
		if f.epoch.Load() == epoch {
			return Pin(epoch & 1)
		}
		f.pins[epoch&1].Add(-1)
	}
}

// End gives a pin back when the I/O is done.
func (f *File) End(p Pin) { f.pins[p].Add(-1) }

// Map returns the extent at offset, at most n bytes of it. The same kind may
// go on behind it.
func (f *File) Map(offset, n int64) (e Extent, err error) {
	if err := f.check(offset, n, false); err != nil {
		return e, err
	}
	err = f.transact(func() error {
		e, err = f.lookup(offset, n)
		return err
	})
	return e, err
}

// Cached is Map without waiting for the file: ok is false if the metadata is
// not in memory, or is damaged.
func (f *File) Cached(offset, n int64) (e Extent, ok bool) {
	if offset < 0 || n <= 0 || offset > f.Size()-n {
		return e, false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	e, err := f.lookup(offset, n)
	return e, err == nil
}

// lookup finds the extent at offset, at most n bytes of it, which are in the
// disk. Preconditions: mu is held.
func (f *File) lookup(offset, n int64) (Extent, error) {
	cb, l2b := f.h.ClusterBits, f.h.l2Bits()
	l1 := f.l1[offset>>(cb+l2b)] & offsetMask
	if l1 == 0 {
		span := f.pages.size / 8 << cb // what one page of the table would map
		return Extent{Kind: Unallocated, Length: min(n, span-offset&(span-1))}, nil
	}
	at := int64(l1) + offset>>cb&(1<<l2b-1)*8
	p, err := f.pages.get(at, pageMapping)
	if err != nil {
		return Extent{}, err
	}
	i, last := (at-p.offset)/8, f.pages.size/8
	cs := f.h.ClusterSize()
	e := f.extent(p.word(i))
	e.Length = cs
	for e.Kind != Compressed && i+1 < last && e.Length-offset&(cs-1) < n {
		i++
		next := f.extent(p.word(i))
		if next.Kind != e.Kind || next.InPlace != e.InPlace || (next.Host == 0) != (e.Host == 0) ||
			e.Host != 0 && next.Host != e.Host+e.Length {
			break
		}
		e.Length += cs
	}
	skip := offset & (cs - 1)
	e.Length = min(e.Length-skip, n)
	if e.Host != 0 {
		e.Host += skip
	}
	return e, nil
}

// extent decodes an L2 entry. The offset of a compressed cluster is no Host.
func (f *File) extent(entry uint64) Extent {
	e := Extent{Kind: kindOf(entry), entry: entry}
	if e.Kind != Compressed {
		e.Host = int64(entry & offsetMask)
		e.InPlace = entry&flagCopied != 0
	}
	return e
}

// position returns the page that holds the L2 entry of offset, and where in it.
// Preconditions: mu is held, the table exists.
func (f *File) position(offset int64) (p *page, i int64, err error) {
	cb, l2b := f.h.ClusterBits, f.h.l2Bits()
	at := int64(f.l1[offset>>(cb+l2b)]&offsetMask) + offset>>cb&(1<<l2b-1)*8
	p, err = f.pages.get(at, pageMapping)
	if err != nil {
		return nil, 0, err
	}
	return p, (at - p.offset) / 8, nil
}
