package snapshot

import (
	"fmt"
	"sort"

	"ditto.vm/memory"
)

// Kind is what the pages of a run equal.
type Kind uint8

// The kinds, as the page map stores them. Zero is none.
const (
	// Zero: they are zeros.
	Zero Kind = 1 + iota
	// Block: they equal blocks of a layer.
	Block
	// Page: they equal other pages of the same snapshot.
	Page
	// FromParent: they equal the same pages of the parent.
	FromParent
	// Unique: their bytes are in pages.
	Unique
)

var kindNames = [...]string{"", "zero", "block", "page", "parent", "unique"}

// String returns zero, block, page, parent or unique.
func (k Kind) String() string {
	if k > 0 && int(k) < len(kindNames) {
		return kindNames[k]
	}
	return fmt.Sprintf("Kind(%d)", uint8(k))
}

// counts reports whether numbers count up within a run.
func (k Kind) counts() bool { return k == Block || k == Page || k == Unique }

// Run is a row of pages of one kind.
type Run struct {
	Start memory.GFN
	Pages uint64
	Kind  Kind
	// Layer is the layer of a Block.
	Layer int
	// Number is, for the first page, its block, its page frame number or its
	// place in pages; the next page has the next. Else zero.
	Number uint64
	// Indexed says that the digest of a Block run is made of the digests that the
	// layer's index has, so that nothing had to be read.
	Indexed bool
}

// flags returns what the page map stores of a run beside its numbers.
func (r *Run) flags() byte {
	if r.Indexed {
		return runIndexed
	}
	return 0
}

// End returns the page after the run's last.
func (r Run) End() memory.GFN { return r.Start + memory.GFN(r.Pages) }

// Range returns the run's addresses.
func (r Run) Range() memory.Range {
	return memory.Range{Start: r.Start.GPA(), Size: r.Pages * memory.PageSize}
}

// cut returns the part of the run in [start, end), which overlaps it.
func (r Run) cut(start, end memory.GFN) Run {
	if start > r.Start {
		if r.Kind.counts() {
			r.Number += uint64(start - r.Start)
		}
		r.Pages -= uint64(start - r.Start)
		r.Start = start
	}
	if end < r.End() {
		r.Pages = uint64(end - r.Start)
	}
	return r
}

// findRun returns the place of the run of n sorted ones that holds gfn, or -1.
func findRun(n int, at func(int) Run, gfn memory.GFN) int {
	i := sort.Search(n, func(i int) bool { return at(i).End() > gfn })
	if i == n || at(i).Start > gfn {
		return -1
	}
	return i
}

// maxBlockRun bounds the pages of a Block run, which has one digest: 256 KiB.
const maxBlockRun = 64

// runList makes maximal runs of pages that come in ascending order.
type runList struct {
	runs    []Run
	regions []memory.Range
}

// add appends pages that lie in one region.
func (l *runList) add(r Run) {
	for r.Pages > 0 {
		n := r.Pages
		if r.Kind == Block {
			n = min(n, maxBlockRun)
		}
		part := r.cut(r.Start, r.Start+memory.GFN(n))
		if !l.extend(part) {
			l.runs = append(l.runs, part)
		}
		if n == r.Pages {
			return
		}
		r = r.cut(r.Start+memory.GFN(n), r.End())
	}
}

// extend lets the last run grow by r, if r goes on where it ends.
func (l *runList) extend(r Run) bool {
	if len(l.runs) == 0 {
		return false
	}
	last := &l.runs[len(l.runs)-1]
	next := last.Number
	if last.Kind.counts() {
		next += last.Pages
	}
	if last.End() != r.Start || last.Kind != r.Kind || last.Layer != r.Layer || r.Number != next {
		return false
	}
	if r.Kind == Block && last.Pages+r.Pages > maxBlockRun {
		return false
	}
	for i := range l.regions {
		if l.regions[i].Start.GFN() == r.Start {
			return false
		}
	}
	last.Pages += r.Pages
	return true
}
