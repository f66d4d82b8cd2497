package memory

import (
	"iter"
	"math/bits"
	"sync/atomic"
)

// PageSet is a set of guest pages: one bit a page, 32 KiB for each GiB of RAM.
// Its words are laid out as KVM lays out a memslot's dirty bitmap, so that one
// region's words can be handed to the kernel as they are.
//
// [PageSet.Add] and [PageSet.Has] may be called from any goroutine at any time.
// The other methods do not lose what is added meanwhile, but may or may not
// see it.
type PageSet struct {
	regions []pageSetRegion
}

// pageSetRegion holds bit i of word i/64 for page i of the range.
type pageSetRegion struct {
	Range
	words []uint64
}

// NewPageSet returns an empty set over the given RAM ranges, which are in
// ascending order and page-aligned.
func NewPageSet(ranges []Range) *PageSet {
	s := &PageSet{regions: make([]pageSetRegion, len(ranges))}
	for i, r := range ranges {
		pages := r.Size >> PageShift
		s.regions[i] = pageSetRegion{Range: r, words: make([]uint64, (pages+63)/64)}
	}
	return s
}

// NewPageSet returns an empty set over the whole Space.
func (s *Space) NewPageSet() *PageSet {
	ranges := make([]Range, len(s.regions))
	for i := range s.regions {
		ranges[i] = s.regions[i].Range
	}
	return NewPageSet(ranges)
}

// Add puts every page that [gpa, gpa+n) touches into the set. What lies outside
// RAM is ignored.
func (s *PageSet) Add(gpa GPA, n uint64) {
	s.each(gpa, n, func(r *pageSetRegion, i int, mask uint64) {
		// Most pages of a busy queue are in the set already: a load keeps the
		// cache line shared where a locked OR would not.
		if w := &r.words[i]; atomic.LoadUint64(w)&mask != mask {
			atomic.OrUint64(w, mask)
		}
	})
}

// Remove takes every page that [gpa, gpa+n) touches out of the set.
func (s *PageSet) Remove(gpa GPA, n uint64) {
	s.each(gpa, n, func(r *pageSetRegion, i int, mask uint64) {
		if w := &r.words[i]; atomic.LoadUint64(w)&mask != 0 {
			atomic.AndUint64(w, ^mask)
		}
	})
}

// Has reports whether the page that holds gpa is in the set.
func (s *PageSet) Has(gpa GPA) bool {
	found := false
	s.each(gpa, 1, func(r *pageSetRegion, i int, mask uint64) {
		found = atomic.LoadUint64(&r.words[i])&mask != 0
	})
	return found
}

// Count returns the number of pages in the set.
func (s *PageSet) Count() uint64 {
	var n uint64
	for i := range s.regions {
		for j := range s.regions[i].words {
			n += uint64(bits.OnesCount64(atomic.LoadUint64(&s.regions[i].words[j])))
		}
	}
	return n
}

// CountIn returns the number of pages in the set that [gpa, gpa+n) touches.
func (s *PageSet) CountIn(gpa GPA, n uint64) uint64 {
	var count uint64
	s.each(gpa, n, func(r *pageSetRegion, i int, mask uint64) {
		count += uint64(bits.OnesCount64(atomic.LoadUint64(&r.words[i]) & mask))
	})
	return count
}

// Clear empties the set.
func (s *PageSet) Clear() {
	for i := range s.regions {
		for j := range s.regions[i].words {
			if w := &s.regions[i].words[j]; atomic.LoadUint64(w) != 0 {
				atomic.StoreUint64(w, 0)
			}
		}
	}
}

// Runs yields the set as maximal runs of pages in ascending order. A run does
// not cross the border of a region.
func (s *PageSet) Runs() iter.Seq[Range] {
	return func(yield func(Range) bool) {
		for i := range s.regions {
			if !s.regions[i].runs(yield) {
				return
			}
		}
	}
}

// runs yields the region's runs and reports whether to go on.
func (r *pageSetRegion) runs(yield func(Range) bool) bool {
	start, open := uint64(0), false
	for i := range r.words {
		word, base := atomic.LoadUint64(&r.words[i]), uint64(i)*64
		for bit := uint64(0); bit < 64; {
			rest := word >> bit
			if open {
				ones := uint64(bits.TrailingZeros64(^rest))
				if bit += ones; bit >= 64 {
					break
				}
				if !yield(r.pages(start, base+bit)) {
					return false
				}
				open = false
				continue
			}
			if rest == 0 {
				break
			}
			bit += uint64(bits.TrailingZeros64(rest))
			start, open = base+bit, true
		}
	}
	return !open || yield(r.pages(start, r.Size>>PageShift))
}

// pages returns the range of the region's pages [from, to).
func (r *pageSetRegion) pages(from, to uint64) Range {
	return Range{Start: r.Start + GPA(from<<PageShift), Size: (to - from) << PageShift}
}

// frames returns the pages of all large frames that a page of the set is of.
func (s *PageSet) frames() *PageSet {
	const each = pagesPerFrame / 64 // words
	all := s.alike()
	for i := range s.regions {
		words, frames := s.regions[i].words, all.regions[i].words
		for first := 0; first < len(words); first += each {
			last := min(first+each, len(words))
			used := uint64(0)
			for j := first; j < last; j++ {
				used |= atomic.LoadUint64(&words[j])
			}
			if used == 0 {
				continue
			}
			for j := first; j < last; j++ {
				frames[j] = ^uint64(0)
			}
		}
		if pages := s.regions[i].Size >> PageShift; pages%64 != 0 {
			frames[len(frames)-1] &= ^uint64(0) >> (64 - pages%64)
		}
	}
	return all
}

// alike returns an empty set over the same ranges.
func (s *PageSet) alike() *PageSet {
	ranges := make([]Range, len(s.regions))
	for i := range s.regions {
		ranges[i] = s.regions[i].Range
	}
	return NewPageSet(ranges)
}

// without takes the pages of another set over the same ranges out of the set,
// which nobody else uses.
func (s *PageSet) without(other *PageSet) {
	for i := range s.regions {
		for j := range s.regions[i].words {
			s.regions[i].words[j] &^= atomic.LoadUint64(&other.regions[i].words[j])
		}
	}
}

// meets reports whether a page is in both sets, which are over the same ranges.
func (s *PageSet) meets(other *PageSet) bool {
	for i := range s.regions {
		for j := range s.regions[i].words {
			if atomic.LoadUint64(&s.regions[i].words[j])&atomic.LoadUint64(&other.regions[i].words[j]) != 0 {
				return true
			}
		}
	}
	return false
}

// union adds the pages of another set over the same ranges.
func (s *PageSet) union(other *PageSet) {
	for i := range s.regions {
		for j := range s.regions[i].words {
			if w := atomic.LoadUint64(&other.regions[i].words[j]); w != 0 {
				s.addWord(i, j, w)
			}
		}
	}
}

// over reports whether the set is over these ranges.
func (s *PageSet) over(regions []Region) bool {
	if len(s.regions) != len(regions) {
		return false
	}
	for i := range regions {
		if s.regions[i].Range != regions[i].Range {
			return false
		}
	}
	return true
}

// spans calls visit with the maximal runs of pages of r, alternately in the set
// and not, in ascending order, until it fails. r is page-aligned and lies in one
// region.
func (s *PageSet) spans(r Range, visit func(run Range, in bool) error) error {
	for at := r.Start; at < r.End(); {
		in := s.Has(at)
		end := s.next(at, r.End(), !in)
		if err := visit(Range{Start: at, Size: uint64(end - at)}, in); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// next returns the first page from gpa on that is in the set, or that is not, and
// end when there is none before.
func (s *PageSet) next(gpa, end GPA, in bool) GPA {
	found := end
	if gpa >= end {
		return end
	}
	for k := range s.regions {
		r := &s.regions[k]
		if !r.Contains(gpa, 1) {
			continue
		}
		page, last := uint64(gpa-r.Start)>>PageShift, min(uint64(end-r.Start)>>PageShift, r.Size>>PageShift)
		for page < last {
			word := atomic.LoadUint64(&r.words[page/64])
			if !in {
				word = ^word
			}
			if word >>= page % 64; word != 0 {
				found = min(r.Start+GPA((page+uint64(bits.TrailingZeros64(word)))<<PageShift), end)
				break
			}
			page = (page/64 + 1) * 64
		}
	}
	return found
}

// moveTo takes the pages of [gpa, gpa+n) out of s and adds them to into, which
// is over the same ranges. No page added meanwhile is lost: it is moved now or
// stays.
func (s *PageSet) moveTo(into *PageSet, gpa GPA, n uint64) {
	s.eachIndexed(gpa, n, func(region, i int, mask uint64) {
		w := &s.regions[region].words[i]
		if atomic.LoadUint64(w)&mask == 0 {
			return
		}
		if old := atomic.AndUint64(w, ^mask) & mask; old != 0 {
			atomic.OrUint64(&into.regions[region].words[i], old)
		}
	})
}

// copyTo adds the pages of [gpa, gpa+n) that are in s to into, which is over
// the same ranges.
func (s *PageSet) copyTo(into *PageSet, gpa GPA, n uint64) {
	s.eachIndexed(gpa, n, func(region, i int, mask uint64) {
		if w := atomic.LoadUint64(&s.regions[region].words[i]) & mask; w != 0 {
			atomic.OrUint64(&into.regions[region].words[i], w)
		}
	})
}

// each calls f for every word that holds a page of [gpa, gpa+n), with the mask
// of those pages.
func (s *PageSet) each(gpa GPA, n uint64, f func(r *pageSetRegion, i int, mask uint64)) {
	s.eachIndexed(gpa, n, func(region, i int, mask uint64) { f(&s.regions[region], i, mask) })
}

func (s *PageSet) eachIndexed(gpa GPA, n uint64, f func(region, i int, mask uint64)) {
	for k := range s.regions {
		part, ok := intersect(s.regions[k].Range, Range{Start: gpa, Size: n})
		if !ok {
			continue
		}
		first := uint64(part.Start-s.regions[k].Start) >> PageShift
		last := (uint64(part.End()-s.regions[k].Start) - 1) >> PageShift
		for i := first / 64; i <= last/64; i++ {
			mask := ^uint64(0)
			if i == first/64 {
				mask &= ^uint64(0) << (first % 64)
			}
			if i == last/64 {
				mask &= ^uint64(0) >> (63 - last%64)
			}
			f(k, int(i), mask)
		}
	}
}

// intersect returns what a and b have in common, and whether that is anything.
// It does not overflow whatever b says.
func intersect(a, b Range) (Range, bool) {
	if a.Size == 0 || b.Size == 0 {
		return Range{}, false
	}
	lastA, lastB := a.Start+GPA(a.Size-1), b.Start+GPA(b.Size-1)
	if lastB < b.Start {
		lastB = ^GPA(0)
	}
	start, last := max(a.Start, b.Start), min(lastA, lastB)
	if start > last {
		return Range{}, false
	}
	return Range{Start: start, Size: uint64(last-start) + 1}, true
}

// addWord adds the pages of one word of a region.
func (s *PageSet) addWord(region, i int, word uint64) {
	atomic.OrUint64(&s.regions[region].words[i], word)
}

// addPage adds one page of a region.
func (s *PageSet) addPage(region int, page uint64) {
	s.addWord(region, int(page/64), 1<<(page%64))
}
