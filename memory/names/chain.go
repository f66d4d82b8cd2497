package names

import (
	"sync"
	"sync/atomic"
)

// inverse finds the pages of a block: a hash of chains through the pages
// themselves. Sixteen neighbouring blocks have neighbouring buckets and one
// lock, since that is how they are read.
//
// A page's link belongs to the chain that its word says, and is looked at only
// under that chain's lock.
type inverse struct {
	heads   []uint32 // number of the first page, plus 1
	next    []uint32 // for each page, likewise
	stripes [stripeCount]stripe
}

type stripe struct {
	mu sync.Mutex
	_  [56]byte // a cache line each
}

const (
	groupShift  = 4 // blocks of a group share a lock
	groupBlocks = 1 << groupShift
	stripeCount = 256
	// longestChain bounds what a guest can make a look-up cost: blocks that
	// fall into one bucket, or one block in very many pages. What does not fit
	// stays without a name.
	longestChain = 32
)

func newInverse(l *lazy, pages uint64) inverse {
	buckets := (pages + groupBlocks - 1) &^ (groupBlocks - 1)
	return inverse{heads: zeroed[uint32](l, buckets), next: zeroed[uint32](l, pages)}
}

// bucket returns where the chain of k begins, and its lock.
func (v *inverse) bucket(k key) (head *uint32, mu *sync.Mutex) {
	// Fibonacci hashing of the group, scaled to the number of groups.
	h := (uint64(k) >> groupShift) * 0x9e3779b97f4a7c15
	groups := uint64(len(v.heads)) >> groupShift
	g := (h >> 32) * groups >> 32
	return &v.heads[g<<groupShift|uint64(k)&(groupBlocks-1)], &v.stripes[g%stripeCount].mu
}

// join turns the page, which is in no chain and whose word is was, into now and
// puts it into now's chain. It returns false when the word is another, and when
// the chain is full.
func (t *Table) join(page uint32, was, now word) bool {
	head, mu := t.inverse.bucket(now.key())
	mu.Lock()
	defer mu.Unlock()
	n := 0
	for p := *head; p != 0; p = t.inverse.next[p-1] {
		if n++; n == longestChain {
			return false
		}
	}
	if !t.swap(page, was, now) {
		return false
	}
	t.inverse.next[page] = *head
	*head = page + 1
	return true
}

// leaveChain takes a page out of the chain of was, and gives it the word that
// turn makes of the one it has by then, which is not chained. It returns false
// when the page is not of was's kind and block any more, and when turn forbids
// it.
//
// The link goes first: a page without a chained word may at once be put into
// another chain.
func (t *Table) leaveChain(page uint32, was word, turn func(word) (now word, ok bool)) bool {
	head, mu := t.inverse.bucket(was.key())
	mu.Lock()
	defer mu.Unlock()
	if w := t.load(page); !w.chained() || w.key() != was.key() {
		return false
	}
	link := head
	for *link != page+1 {
		link = &t.inverse.next[*link-1]
	}
	*link = t.inverse.next[page]
	for {
		w := t.load(page)
		now, ok := turn(w)
		if !ok || w.kind() != was.kind() {
			*link = page + 1
			return false
		}
		if t.swap(page, w, now) {
			return true
		}
	}
}

// spoil drops the names of the blocks of s, and lets I/O in flight that reads
// or writes them record nothing. It returns how many names were dropped.
func (t *Table) spoil(s span) (dropped uint64) {
	if s.last-s.first >= t.pages {
		return t.spoilAll(s)
	}
	for first := s.first; first <= s.last; first = (first | (groupBlocks - 1)) + 1 {
		last := min(first|(groupBlocks-1), s.last)
		_, mu := t.inverse.bucket(makeKey(s.layer, first))
		mu.Lock()
		for b := first; b <= last; b++ {
			dropped += t.spoilBlock(makeKey(s.layer, b))
		}
		mu.Unlock()
	}
	return dropped
}

// spoilBlock does so for one block. Preconditions: its chain is locked.
func (t *Table) spoilBlock(k key) (dropped uint64) {
	link, _ := t.inverse.bucket(k)
	for *link != 0 {
		page := *link - 1
		w := t.load(page)
		if w.key() != k {
			link = &t.inverse.next[page]
			continue
		}
		*link = t.inverse.next[page]
		if !t.swap(page, w, w.spoilt()) {
			*link = page + 1 // a flag changed: again
			continue
		}
		if w.kind() == kindNamed {
			dropped++
		}
	}
	return dropped
}

// spoilAll does so for more blocks than there are pages.
func (t *Table) spoilAll(s span) (dropped uint64) {
	for page := range uint32(t.pages) {
		w := t.load(page)
		if b := w.key().block(); !w.chained() || w.key().layer() != s.layer || b < s.first || b > s.last {
			continue
		}
		if t.leaveChain(page, w, func(w word) (word, bool) { return w.spoilt(), true }) && w.kind() == kindNamed {
			dropped++
		}
	}
	return dropped
}

// load reads the word of a page.
func (t *Table) load(page uint32) word { return word(atomic.LoadUint64(&t.words[page])) }
