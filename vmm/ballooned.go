package vmm

import (
	"errors"

	"ditto.vm/memory"
)

// ballooned keeps the frames small that the balloon holds pages of: to make them
// large would fill the holes that the guest made. It implements balloon.Holder.
type ballooned struct {
	space  *memory.Space
	frames *memory.Frames
	pages  *memory.PageSet // in the balloon; nil until the first
}

// Hold implements balloon.Holder.
func (b *ballooned) Hold(r memory.Range) {
	if b.pages == nil {
		b.pages = b.space.NewPageSet()
	}
	b.pages.Add(r.Start, r.Size)
	b.frames.Hold(r, memory.ReasonBalloon)
}

// Release implements balloon.Holder. A frame is settled with the last of its
// pages.
func (b *ballooned) Release(r memory.Range) {
	if b.pages == nil {
		return
	}
	b.pages.Remove(r.Start, r.Size)
	const frame = memory.LargeFrameSize
	for gpa := r.Start &^ (frame - 1); gpa < r.End(); gpa += frame {
		if b.pages.CountIn(gpa, frame) == 0 {
			b.frames.Settle(memory.Range{Start: gpa, Size: frame}, memory.ReasonBalloon)
		}
	}
}

// ReleaseAll implements balloon.Holder.
func (b *ballooned) ReleaseAll() {
	if b.pages == nil {
		return
	}
	b.pages = nil
	for _, region := range b.space.Regions() {
		b.frames.Settle(region.Range, memory.ReasonBalloon)
	}
}

// saved returns the pages as the section of the balloon has them: in runs, each as
// how many pages it is behind the run before and how many it has.
func (b *ballooned) saved() (held []uint64) {
	if b == nil || b.pages == nil {
		return nil
	}
	end := memory.GPA(0)
	for r := range b.pages.Runs() {
		held = append(held, uint64(r.Start-end)/memory.PageSize, r.Size/memory.PageSize)
		end = r.End()
	}
	return held
}

// restore holds what was saved.
func (b *ballooned) restore(held []uint64) error {
	const limit = 1 << 40 // pages, more than any guest has
	if len(held)%2 != 0 {
		return errors.New("half a run of pages in the balloon")
	}
	end := uint64(0)
	for ; len(held) > 0; held = held[2:] {
		gap, n := held[0], held[1]
		if n == 0 || gap > limit-end || n > limit-end-gap {
			return errors.New("a run of pages in the balloon is empty or ends behind all memory")
		}
		if b != nil {
			b.Hold(memory.Range{Start: memory.GPA((end + gap) * memory.PageSize), Size: n * memory.PageSize})
		}
		end += gap + n
	}
	return nil
}
