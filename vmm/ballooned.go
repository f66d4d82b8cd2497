package vmm

import "ditto.vm/memory"

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
