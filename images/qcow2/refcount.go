package qcow2

import "encoding/binary"

// refcountAt reads the ith refcount of width 1<<order bits from a refcount
// block, or a piece of one. Those below a byte begin at the lowest bit.
func refcountAt(b []byte, i int64, order uint) uint64 {
	switch order {
	case 3:
		return uint64(b[i])
	case 4:
		return uint64(binary.BigEndian.Uint16(b[2*i:]))
	case 5:
		return uint64(binary.BigEndian.Uint32(b[4*i:]))
	case 6:
		return binary.BigEndian.Uint64(b[8*i:])
	}
	width := uint(1) << order
	shift := uint(i) << order & 7
	return uint64(b[i<<order>>3]>>shift) & (1<<width - 1)
}

// setRefcountAt is the reverse.
func setRefcountAt(b []byte, i int64, order uint, v uint64) {
	switch order {
	case 3:
		b[i] = byte(v)
	case 4:
		binary.BigEndian.PutUint16(b[2*i:], uint16(v))
	case 5:
		binary.BigEndian.PutUint32(b[4*i:], uint32(v))
	case 6:
		binary.BigEndian.PutUint64(b[8*i:], v)
	default:
		width := uint(1) << order
		shift := uint(i) << order & 7
		at := &b[i<<order>>3]
		*at = *at&^(byte(1<<width-1)<<shift) | byte(v)<<shift
	}
}

// counts returns the page that holds the refcount of a cluster, and where in
// it; no page if no refcount block covers the cluster. Preconditions: mu is
// held, the refcount table covers the cluster.
func (f *File) counts(cluster int64) (p *page, i int64, err error) {
	bb := f.h.blockBits()
	block := int64(f.refs[cluster>>bb])
	if block == 0 {
		return nil, 0, nil
	}
	i = cluster & (1<<bb - 1)
	p, err = f.pages.get(block+i<<f.h.refcountOrder>>3, pageCounts)
	if err != nil {
		return nil, 0, err
	}
	// Its index in the page.
	first := (p.offset - block) << 3 >> f.h.refcountOrder
	return p, i - first, nil
}

// perPage is how many refcounts a page holds.
func (f *File) perPage() int64 { return f.pages.size << 3 >> f.h.refcountOrder }

// covered is how many clusters the refcount table has room for. Preconditions:
// mu is held.
func (f *File) covered() int64 { return int64(len(f.refs)) << f.h.blockBits() }

// addCount adds delta to the refcount of a cluster. Preconditions: mu is held.
func (f *File) addCount(cluster, delta int64) error {
	if cluster >= f.covered() {
		return f.damaged(corrupt("cluster %d has no refcount", cluster))
	}
	p, i, err := f.counts(cluster)
	if err != nil {
		return err
	}
	if p == nil {
		return f.damaged(corrupt("cluster %d has no refcount", cluster))
	}
	now := int64(refcountAt(p.data, i, f.h.refcountOrder)) + delta
	if now < 0 {
		return f.damaged(corrupt("cluster %d has a refcount below zero", cluster))
	}
	setRefcountAt(p.data, i, f.h.refcountOrder, uint64(now))
	f.touch(p)
	return nil
}

// touch marks a page as to be written. Preconditions: mu is held.
func (f *File) touch(p *page) {
	f.pages.touch(p)
	f.unflushed.Store(true)
}
