package names

import "sync"

// changes are the ranges of blocks that are being written or erased right now,
// by buckets of 1 MiB of disk so that a request looks at few others.
type changes struct {
	buckets [changeBuckets]struct {
		mu    sync.Mutex
		spans []span
	}
}

const (
	changeBuckets = 1024
	chunkShift    = 8 // blocks of a bucket: 1 MiB
	// layerStride keeps equal blocks of different layers apart.
	layerStride = 389
)

// span is the blocks [first, last] of a layer.
type span struct {
	layer       LayerID
	first, last uint64
}

func (s span) overlaps(o span) bool {
	return s.layer == o.layer && s.first <= o.last && o.first <= s.last
}

// each calls f once for every bucket in which s is to be found, until f returns
// false. Neighbouring chunks have neighbouring buckets, so that a span meets
// none twice.
func (c *changes) each(s span, f func(spans *[]span) bool) {
	first := s.first >> chunkShift
	n := min(s.last>>chunkShift-first+1, changeBuckets)
	for i := range n {
		b := &c.buckets[(first+i+uint64(s.layer)*layerStride)%changeBuckets]
		b.mu.Lock()
		more := f(&b.spans)
		b.mu.Unlock()
		if !more {
			return
		}
	}
}

// begin notes that s is being changed.
func (c *changes) begin(s span) {
	c.each(s, func(spans *[]span) bool {
		*spans = append(*spans, s)
		return true
	})
}

// end takes s out again.
func (c *changes) end(s span) {
	c.each(s, func(spans *[]span) bool {
		for i, o := range *spans {
			if o == s {
				last := len(*spans) - 1
				(*spans)[i] = (*spans)[last]
				*spans = (*spans)[:last]
				break
			}
		}
		return true
	})
}

// others reports whether more than own spans overlap s: 0 for a reader, 1 for
// whoever noted a span around s itself.
func (c *changes) others(s span, own int) bool {
	found := false
	c.each(s, func(spans *[]span) bool {
		n := 0
		for _, o := range *spans {
			if o.overlaps(s) {
				n++
			}
		}
		found = found || n > own
		return !found
	})
	return found
}
