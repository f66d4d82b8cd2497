package snapshot

import (
	"fmt"
	"sort"

	"ditto.vm/memory"
)

// writeVersion says that a file is of a newer version.
func writeVersion(v uint32) error {
	return fmt.Errorf("%w: page map of format %d, this program reads up to %d", ErrVersion, v, Format)
}

// compressed reports whether pages holds frames.
func (p *pageMap) compressed() bool { return p.framePages != 0 }

// checkFrames checks that frames lie in pages in ascending order, and account
// for all slots.
func (p *pageMap) checkFrames() error {
	slots := uint64(len(p.digests))
	if !p.compressed() {
		if len(p.frames) != 0 || p.pagesSize != slots*memory.PageSize {
			return formatError("page map: %d frames and %d bytes for %d slots", len(p.frames), p.pagesSize, slots)
		}
		return nil
	}
	if slots != uint64(len(p.frames))*uint64(p.framePages) {
		return formatError("page map: %d frames of %d pages for %d slots", len(p.frames), p.framePages, slots)
	}
	end := uint64(0)
	for i, f := range p.frames {
		if f.offset < end || f.size == 0 || uint64(f.size) > uint64(f.pages)*memory.PageSize+frameSlack || f.pages == 0 || f.pages > p.framePages ||
			f.offset > p.pagesSize || uint64(f.size) > p.pagesSize-f.offset {
			return formatError("page map: frame %d of %d pages: %d bytes at %d", i, f.pages, f.size, f.offset)
		}
		end = f.offset + uint64(f.size)
	}
	if end != p.pagesSize {
		return formatError("page map: frames end at %d of %d bytes", end, p.pagesSize)
	}
	return nil
}

// checkSlots checks that every Unique run has places that exist and that no
// other has, and that exactly these have a digest.
func (p *pageMap) checkSlots() error {
	used := make([]bool, len(p.digests))
	for i, r := range p.runs {
		if r.Kind != Unique {
			continue
		}
		if r.Number+r.Pages > uint64(len(used)) {
			return formatError("page map: run %d: slot %d of %d", i, r.Number+r.Pages-1, len(used))
		}
		for slot := r.Number; slot < r.Number+r.Pages; slot++ {
			if used[slot] {
				return formatError("page map: run %d: slot %d belongs to another page", i, slot)
			}
			if p.compressed() && slot%uint64(p.framePages) >= uint64(p.frames[slot/uint64(p.framePages)].pages) {
				return formatError("page map: run %d: slot %d is not in its frame", i, slot)
			}
			used[slot] = true
		}
	}
	for slot, u := range used {
		if u == (p.digests[slot] == Digest{}) {
			return formatError("page map: slot %d: used %v, digest %s", slot, u, p.digests[slot])
		}
	}
	return nil
}

// checkTargets checks that pages that equal others equal some that stand for
// themselves: no reference leads to another of the same snapshot, or to zeros.
func (p *pageMap) checkTargets() error {
	// before[i] counts the pages before run i that nothing may refer to.
	before := make([]uint64, len(p.runs)+1)
	for i, r := range p.runs {
		before[i+1] = before[i]
		if r.Kind == Page || r.Kind == Zero {
			before[i+1] += r.Pages
		}
	}
	unfit := func(gfn memory.GFN) uint64 {
		i := sort.Search(len(p.runs), func(i int) bool { return p.runs[i].End() > gfn })
		n := before[i]
		if i < len(p.runs) && gfn > p.runs[i].Start && before[i+1] != before[i] {
			n += uint64(gfn - p.runs[i].Start)
		}
		return n
	}
	for i, r := range p.runs {
		if r.Kind != Page {
			continue
		}
		first, last := memory.GFN(r.Number), memory.GFN(r.Number+r.Pages-1)
		if p.find(first) < 0 || p.find(last) < 0 || first < memory.HoleStart.GFN() && last >= memory.HoleStart.GFN() || unfit(last+1) != unfit(first) {
			return formatError("page map: run %d refers to pages from %s on, not all of which stand for themselves", i, first)
		}
	}
	return nil
}

// find returns the place of the run of a page, or -1.
func (p *pageMap) find(gfn memory.GFN) int {
	return findRun(len(p.runs), func(i int) Run { return p.runs[i] }, gfn)
}
