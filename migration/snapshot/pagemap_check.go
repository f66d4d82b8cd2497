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
	slots := p.slots
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

// markSlots checks that every Unique run has places that exist and that no
// other has, and notes them.
func (p *pageMap) markSlots() error {
	p.used = make([]uint64, (p.slots+63)/64)
	for i, r := range p.runs {
		if r.Kind != Unique {
			continue
		}
		if r.Number+r.Pages > p.slots {
			return formatError("page map: run %d: slot %d of %d", i, r.Number+r.Pages-1, p.slots)
		}
		if slot, ok := p.inFrames(r); !ok {
			return formatError("page map: run %d: slot %d is not in its frame", i, slot)
		}
		for at, end := r.Number, r.Number+r.Pages; at < end; {
			n := min(64-at%64, end-at)
			mask := ^uint64(0) >> (64 - n) << (at % 64)
			if p.used[at/64]&mask != 0 {
				return formatError("page map: run %d: a slot from %d on belongs to another page", i, at)
			}
			p.used[at/64] |= mask
			at += n
		}
	}
	return nil
}

// inFrames reports whether the frames have the slots of a run, and the first
// that is missing.
func (p *pageMap) inFrames(r Run) (slot uint64, ok bool) {
	if !p.compressed() {
		return 0, true
	}
	each, end := uint64(p.framePages), r.Number+r.Pages
	for f := r.Number / each; f*each < end; f++ {
		if has := f*each + uint64(p.frames[f].pages); min(end, (f+1)*each) > has {
			return max(has, r.Number), false
		}
	}
	return 0, true
}

// isUsed reports whether a page is in the slot.
func (p *pageMap) isUsed(slot uint64) bool { return p.used[slot/64]>>(slot%64)&1 != 0 }

// checkTargets checks that pages that equal others equal some that stand for
// themselves: no reference leads to another of the same snapshot, or to zeros.
func (p *pageMap) checkTargets() error {
	if p.holds.Duplicate == 0 {
		return nil
	}
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
