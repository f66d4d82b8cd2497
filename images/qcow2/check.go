package qcow2

import "math"

// maxCounted bounds what a check holds in memory: clusters of the file.
const maxCounted = 64 << 20

// Report is what a check found.
type Report struct {
	// Allocated clusters of the disk, and Compressed ones among them.
	Allocated, Compressed int64
	// Leaks are refcounts that are too high, which only wastes space; Low are
	// such that are too low, which is damage.
	Leaks, Low int64
}

// counter counts references.
type counter struct {
	f      *File
	counts []uint16
	report Report
}

// add counts a reference to the n bytes at offset.
func (c *counter) add(offset, n int64) error {
	cb := c.f.h.ClusterBits
	for i := offset >> cb; i <= (offset+n-1)>>cb; i++ {
		switch {
		case i >= int64(len(c.counts)):
			return corrupt("the file ends before %#x, which is referenced", i<<cb)
		case c.counts[i] == math.MaxUint16:
			return corrupt("cluster %#x has too many references", i<<cb)
		}
		c.counts[i]++
	}
	return nil
}

// countReferences counts what the tables of an open image reference. Nothing
// may be in flight.
func (f *File) countReferences() (*counter, error) {
	cs := f.h.ClusterSize()
	c := &counter{f: f, counts: make([]uint16, f.high)}
	if err := c.add(0, cs); err != nil {
		return nil, err
	}
	if len(f.l1) > 0 {
		if err := c.add(f.h.l1Offset, int64(len(f.l1))*8); err != nil {
			return nil, err
		}
	}
	if err := c.add(f.h.refOffset, int64(f.h.refClusters)*cs); err != nil {
		return nil, err
	}
	for _, e := range f.refs {
		if e != 0 {
			if err := c.add(int64(e), cs); err != nil {
				return nil, err
			}
		}
	}
	for _, e := range f.l1 {
		if at := int64(e & offsetMask); at != 0 {
			if err := c.add(at, cs); err != nil {
				return nil, err
			}
			if err := c.table(at); err != nil {
				return nil, err
			}
		}
	}
	return c, nil
}

// table counts what an L2 table references.
func (c *counter) table(at int64) error {
	entries, err := readTable(c.f.s, at, int(c.f.h.ClusterSize()/8))
	if err != nil {
		return unreadable(err)
	}
	for _, e := range entries {
		c.f.mu.Lock()
		err := c.f.checkTarget(e)
		c.f.mu.Unlock()
		if err != nil {
			return err
		}
		host, n := int64(e&offsetMask), c.f.h.ClusterSize()
		switch {
		case e&flagCompressed != 0:
			host, n = c.f.h.compressedRange(e)
			n = min(n, int64(len(c.counts))<<c.f.h.ClusterBits-host)
			c.report.Compressed++
		case host == 0:
			continue
		}
		c.report.Allocated++
		if err := c.add(host, n); err != nil {
			return err
		}
	}
	return nil
}

// recoverCounts frees the clusters that an image leaked which was not closed
// properly. Refcounts that are too low are raised if the image says that they
// may be (lazy refcounts); otherwise it is damaged.
func (f *File) recoverCounts() error {
	const cure = "repair it with 'qemu-img check -r all'"
	lazy := f.h.LazyRefcounts
	// What is seen now must be what a power cut leaves of it.
	if err := f.s.Flush(); err != nil {
		return unreadable(err)
	}
	f.marked.Store(true)
	if f.high > maxCounted {
		if lazy {
			return refusal(cure, "was not closed properly")
		}
		return nil
	}
	c, err := f.countReferences()
	if err != nil {
		return refusal(cure, "was not closed properly and is damaged: %v", err)
	}
	for block := range f.refs {
		if err := f.recoverBlock(c, int64(block)); err != nil {
			return err
		}
	}
	if c.report.Low > 0 && !lazy {
		return refusal(cure, "is damaged: %d refcounts are too low", c.report.Low)
	}
	return f.Flush()
}

// recoverBlock corrects the refcounts of one refcount block.
func (f *File) recoverBlock(c *counter, block int64) error {
	bb := f.h.blockBits()
	first := block << bb
	end := min(first+1<<bb, int64(len(c.counts)))
	if f.refs[block] == 0 {
		for i := first; i < end; i++ {
			if c.counts[i] != 0 {
				return refusal("repair it with 'qemu-img check -r all'", "lacks a refcount block for cluster %d", i)
			}
		}
		return nil
	}
	for at := first; at < first+1<<bb; at += f.perPage() {
		err := f.transact(func() error { return f.recoverPage(c, at) })
		if err != nil {
			return err
		}
	}
	return nil
}

// recoverPage corrects the refcounts of the page that begins with a cluster.
// Preconditions: mu is held.
func (f *File) recoverPage(c *counter, cluster int64) error {
	p, first, err := f.counts(cluster)
	if err != nil {
		return err
	}
	for i := first; i < f.perPage(); i++ {
		have, want := refcountAt(p.data, i, f.h.refcountOrder), uint64(0)
		if at := cluster + i - first; at < int64(len(c.counts)) {
			want = uint64(c.counts[at])
		}
		switch {
		case have == want:
			continue
		case have < want:
			c.report.Low++
			if !f.h.LazyRefcounts {
				continue
			}
		default:
			c.report.Leaks++
		}
		setRefcountAt(p.data, i, f.h.refcountOrder, want)
		f.touch(p)
	}
	return nil
}
