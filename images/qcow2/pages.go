package qcow2

import "encoding/binary"

// Sizes of the metadata cache.
const (
	maxPageBytes  = 4096
	maxCacheBytes = 16 << 20 // of clean pages; maps 128 GiB in 64 KiB clusters
	maxDirtyBytes = 8 << 20  // then an allocating write flushes first
)

type pageKind uint8

const (
	pageMapping pageKind = iota // of an L2 table
	pageCounts                  // of a refcount block
)

// phase is when a flush writes a page; see the package comment.
type phase uint8

const (
	phaseNewBlock phase = iota
	phaseCounts
	phaseMapping
	phases
)

// page is a piece of an L2 table or a refcount block. All of it is guarded by
// File.mu.
type page struct {
	offset  int64 // in the file
	kind    pageKind
	data    []byte
	phase   phase
	dirty   bool // to be written
	writing bool // being written
	used    bool // since the clock's hand passed
}

func (p *page) word(i int64) uint64 { return binary.BigEndian.Uint64(p.data[8*i:]) }

func (p *page) setWord(i int64, w uint64) { binary.BigEndian.PutUint64(p.data[8*i:], w) }

// pageCache holds pages by their offset in the file. Clean ones are dropped,
// the least recently used first, when there are too many.
type pageCache struct {
	size  int64 // of a page
	limit int64 // bytes of clean pages
	byOff map[int64]*page
	clock []*page
	hand  int
	dirty int // pages
}

func newPageCache(clusterSize int64) pageCache {
	return pageCache{size: min(clusterSize, maxPageBytes), limit: maxCacheBytes, byOff: map[int64]*page{}}
}

// missing is the error of an operation that needs a page which is not in
// memory.
type missing struct {
	offset int64
	kind   pageKind
}

// Error implements error.
func (missing) Error() string { return "metadata is not in memory" }

// get returns the page that covers an offset of the file, or missing.
func (c *pageCache) get(offset int64, kind pageKind) (*page, error) {
	at := offset &^ (c.size - 1)
	p := c.byOff[at]
	if p == nil {
		return nil, missing{at, kind}
	}
	p.used = true
	return p, nil
}

// add puts a page into the cache.
func (c *pageCache) add(offset int64, kind pageKind, data []byte) *page {
	p := &page{offset: offset, kind: kind, data: data, used: true}
	p.phase = kind.phase()
	if int64(len(c.clock)-c.dirty)*c.size >= c.limit {
		if slot := c.evict(); slot >= 0 {
			c.clock[slot] = p
			c.byOff[offset] = p
			return p
		}
	}
	c.clock = append(c.clock, p)
	c.byOff[offset] = p
	return p
}

// phase is when the pages of a table are written that is in use already.
func (k pageKind) phase() phase {
	if k == pageCounts {
		return phaseCounts
	}
	return phaseMapping
}

// evict drops a clean page and returns its place in the clock, -1 if there is
// none.
func (c *pageCache) evict() int {
	for range 2 * len(c.clock) {
		c.hand = (c.hand + 1) % len(c.clock)
		p := c.clock[c.hand]
		switch {
		case p.dirty || p.writing:
		case p.used:
			p.used = false
		default:
			delete(c.byOff, p.offset)
			return c.hand
		}
	}
	return -1
}

// touch marks a page as to be written.
func (c *pageCache) touch(p *page) {
	if !p.dirty {
		p.dirty = true
		c.dirty++
	}
}

// zeros adds the pages of a new table at a cluster: all of them if the cluster
// may hold something, otherwise the one that covers offset.
func (c *pageCache) zeros(cluster, clusterSize, offset int64, kind pageKind, when phase, all bool) {
	first, end := offset&^(c.size-1), offset&^(c.size-1)+c.size
	if all {
		first, end = cluster, cluster+clusterSize
	}
	for at := first; at < end; at += c.size {
		p := c.add(at, kind, make([]byte, c.size))
		p.phase = when
		c.touch(p)
	}
}
