package memory

import (
	"errors"
	"fmt"
	"math/bits"
	"strings"
	"sync"
)

// FrameState is how the host maps a large frame.
type FrameState uint8

// The states of a frame.
const (
	// FrameEmpty: no page of it is populated.
	FrameEmpty FrameState = iota
	// FrameSmall: mapped by 4 KiB pages.
	FrameSmall
	// FrameLarge: mapped by one huge page, so that EPT/NPT can do the same.
	FrameLarge
)

// String returns empty, small or large.
func (s FrameState) String() string { return [...]string{"empty", "small", "large", "?"}[s&3] }

// FrameReasons is the set of reasons for which a frame is small.
type FrameReasons uint8

// The reasons. The first three are told by whoever acts on the frame, with
// [Frames.Break] and [Frames.Settle]; the last two are read from the host by
// [Frames.Refresh].
const (
	// ReasonShared: pages of it are merged with equal ones.
	ReasonShared FrameReasons = 1 << iota
	// ReasonRemap: pages of it are mapped from an image or snapshot file, or are
	// missing. The Space tells it itself.
	ReasonRemap
	// ReasonBalloon: the balloon holds pages of it.
	ReasonBalloon
	// ReasonTracking: pages of it are armed, and it was written since.
	ReasonTracking
	// ReasonPartial: not all of its pages are populated.
	ReasonPartial

	reasonsTold = ReasonShared | ReasonRemap | ReasonBalloon
	reasonsRead = ReasonTracking | ReasonPartial
	reasonCount = 5
)

var reasonNames = [reasonCount]string{"shared", "remap", "balloon", "tracking", "partial"}

// String lists the reasons, joined by "+", or returns "none".
func (r FrameReasons) String() string {
	var names []string
	for i, name := range reasonNames {
		if r&(1<<i) != 0 {
			names = append(names, name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, "+")
}

// Errors of breaking and collapsing frames, wrapped by a [FrameError].
var (
	// ErrNotAFrame: the address is not that of a large frame inside RAM.
	ErrNotAFrame = errors.New("not a large frame of guest RAM")
	// ErrFrameHeld: a reason still stands, or pages are missing.
	ErrFrameHeld = errors.New("the frame has a reason to be small")
	// ErrFrameBusy: pages are pinned by I/O or locked; try again later.
	ErrFrameBusy = errors.New("the frame is busy")
	// ErrNoHugePage: the host has no free huge page now.
	ErrNoHugePage = errors.New("the host has no free huge page")
	// ErrFrameFixed: the backing's page size cannot be changed.
	ErrFrameFixed = errors.New("this memory has pages of one fixed size")
)

// FrameError is a failed operation on one frame.
type FrameError struct {
	Op  string // break or collapse
	GPA GPA
	Err error
}

// Error implements error.
func (e *FrameError) Error() string { return fmt.Sprintf("%s frame %s: %v", e.Op, e.GPA, e.Err) }

// Unwrap returns the cause.
func (e *FrameError) Unwrap() error { return e.Err }

// pagesPerFrame is the number of small pages in a large frame.
const pagesPerFrame = LargeFrameSize / PageSize

// Frames keeps, for each large frame of guest memory, how the host maps it and
// why it is small when it is: one byte a frame, 512 bytes for each GiB.
//
//	       fault of the guest                     Break, a write to an armed
//	empty --------------------> large (or small)  frame, a discard
//	  ^                           |  ^  |
//	  | discard of all            |  |  +-----------------> small + reasons
//	  +---------------------------+  +------------------------+
//	                                 Collapse, once no reason is left
//
// The host changes frames behind ditto's back: the guest's faults populate
// them, khugepaged collapses them. So the state is what [Frames.Refresh] read
// last or an operation left, while the reasons told by their owners stand until
// they are settled. A frame is one byte, so a reason is not counted: who breaks
// a frame for several pages settles it when the last of them is whole again.
type Frames struct {
	space   *Space
	tracker Tracker

	mu      sync.Mutex // guards what follows
	pages   *pagemap
	regions [][]frameByte
}

// frameByte is a FrameState in bits 6 and 7 and FrameReasons below.
type frameByte uint8

func makeFrame(s FrameState, r FrameReasons) frameByte { return frameByte(s)<<6 | frameByte(r) }
func (f frameByte) state() FrameState                  { return FrameState(f >> 6) }
func (f frameByte) reasons() FrameReasons              { return FrameReasons(f & 0x3f) }

// NewFrames returns the book of all frames of the Space, refreshed. The tracker
// is the Space's own.
func NewFrames(s *Space, tracker Tracker) (*Frames, error) {
	pages, err := openPagemap()
	if err != nil {
		return nil, err
	}
	f := &Frames{space: s, tracker: tracker, pages: pages}
	for i := range s.regions {
		f.regions = append(f.regions, make([]frameByte, s.regions[i].Size/LargeFrameSize))
	}
	for i := range s.regions {
		if err := f.Refresh(s.regions[i].Range); err != nil {
			return nil, errors.Join(err, f.Close())
		}
	}
	s.book.Store(f)
	for i := range s.regions {
		if s.foreign(s.regions[i].Range) {
			s.settle(s.regions[i].Range)
		}
	}
	return f, nil
}

// Close gives back what the book holds.
func (f *Frames) Close() error {
	f.space.book.CompareAndSwap(f, nil)
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.pages.close()
}

// At returns the state and reasons of the frame that holds gpa, and whether
// there is one.
func (f *Frames) At(gpa GPA) (FrameState, FrameReasons, bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	b := f.find(gpa)
	if b == nil {
		return 0, 0, false
	}
	return b.state(), b.reasons(), true
}

// find returns the entry of the frame that holds gpa, or nil.
func (f *Frames) find(gpa GPA) *frameByte {
	for i := range f.space.regions {
		if r := &f.space.regions[i]; r.Contains(gpa, 1) {
			if n := uint64(gpa-r.Start) / LargeFrameSize; n < uint64(len(f.regions[i])) {
				return &f.regions[i][n]
			}
		}
	}
	return nil
}

// Hold notes why the frames that r touches must stay small, without breaking
// them: for pages that the owner of the reason is about to change itself.
func (f *Frames) Hold(r Range, why FrameReasons) { f.change(r, why&reasonsTold, 0) }

// Settle says that a reason is gone from the frames that r touches. The policy
// makes them large again when no other is left.
func (f *Frames) Settle(r Range, why FrameReasons) { f.change(r, 0, why&reasonsTold) }

func (f *Frames) change(r Range, set, unset FrameReasons) {
	_ = f.touched(r, func(region, first, end int) error {
		for n := first; n < end; n++ {
			f.regions[region][n] = f.regions[region][n]&^frameByte(unset) | frameByte(set)
		}
		return nil
	})
}

// touched calls f with the frames [first, end) of each region that r touches,
// under the lock.
func (f *Frames) touched(r Range, do func(region, first, end int) error) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for i := range f.regions {
		part, ok := intersect(f.space.regions[i].Range, r)
		if !ok {
			continue
		}
		base := f.space.regions[i].Start
		first := int(uint64(part.Start-base) / LargeFrameSize)
		last := int((uint64(part.End()-base) - 1) / LargeFrameSize)
		if err := do(i, first, min(last+1, len(f.regions[i]))); err != nil {
			return err
		}
	}
	return nil
}

// Census counts frames.
type Census struct {
	Frames  int              // whole frames in RAM
	States  [3]int           // by FrameState
	Reasons [reasonCount]int // small frames by reason, in the order of the bits
	// Unexplained small frames have no reason: the host had no huge page, or a
	// reason is gone and the policy has not come by.
	Unexplained int
}

// Large returns the number of large frames.
func (c Census) Large() int { return c.States[FrameLarge] }

// Small returns the number of small frames.
func (c Census) Small() int { return c.States[FrameSmall] }

// Empty returns the number of empty frames.
func (c Census) Empty() int { return c.States[FrameEmpty] }

// Because returns how many small frames have the reason.
func (c Census) Because(r FrameReasons) int {
	if r == 0 {
		return c.Unexplained
	}
	return c.Reasons[bits.TrailingZeros8(uint8(r))]
}

// Census counts what the book says; [Frames.Refresh] makes it say the truth.
func (f *Frames) Census() Census {
	f.mu.Lock()
	defer f.mu.Unlock()
	var c Census
	for _, region := range f.regions {
		for _, b := range region {
			c.Frames++
			c.States[b.state()]++
			if b.state() != FrameSmall {
				continue
			}
			if b.reasons() == 0 {
				c.Unexplained++
			}
			for i := range c.Reasons {
				if b.reasons()&(1<<i) != 0 {
					c.Reasons[i]++
				}
			}
		}
	}
	return c
}

// count returns the number of whole frames in RAM, which never changes.
func (f *Frames) count() int {
	n := 0
	for _, region := range f.regions {
		n += len(region)
	}
	return n
}

// Refresh reads from the host how it maps the frames that r touches.
func (f *Frames) Refresh(r Range) error {
	if err := f.touched(r, f.refresh); err != nil {
		return fmt.Errorf("refresh frames at %s: %w", r.Start, err)
	}
	return nil
}

// frameScan asks for everything that is populated and not the zero page.
var frameScan = scanQuery{
	mask: pageIsPFNZero, inverted: pageIsPFNZero,
	anyOf: pageIsPresent | pageIsSwapped,
	ret:   pageIsHuge | pageIsWritten | pageIsFile,
}

// refresh reads the frames [first, end) of a region. The scan yields runs in
// ascending order: each frame is closed when the next one begins.
//
// Preconditions: mu is held.
func (f *Frames) refresh(region, first, end int) error {
	hva := uintptr(f.space.regions[region].HVA)
	armable := f.tracker.Kind() == TrackerWPAsync
	current, seen := first, frameTruth{}
	settle := func(upTo int) {
		for ; current < upTo; current++ {
			b := &f.regions[region][current]
			*b = seen.frame(b.reasons() & reasonsTold)
			seen = frameTruth{}
		}
	}
	err := f.pages.scan(hva+uintptr(first)*LargeFrameSize, hva+uintptr(end)*LargeFrameSize, frameScan,
		func(start, end uintptr, categories uint64) {
			for start < end {
				n := int((start - hva) / LargeFrameSize)
				settle(n)
				stop := min(end, hva+uintptr(n+1)*LargeFrameSize)
				seen.add(int(stop-start)/PageSize, categories, armable)
				start = stop
			}
		})
	if err != nil {
		return err
	}
	settle(end)
	return nil
}

// frameTruth is what a scan found in one frame.
type frameTruth struct {
	pages int
	huge  bool
	armed bool
}

func (t *frameTruth) add(pages int, categories uint64, armable bool) {
	t.pages += pages
	if categories&pageIsHuge != 0 && pages == pagesPerFrame {
		t.huge = true
	}
	// A page of a file is not armed: its first write gives it a page of its own.
	if armable && categories&(pageIsWritten|pageIsFile) == 0 {
		t.armed = true
	}
}

// frame joins the truth with the reasons that owners told.
func (t *frameTruth) frame(told FrameReasons) frameByte {
	switch {
	case t.huge:
		return makeFrame(FrameLarge, told)
	case t.pages == 0:
		return makeFrame(FrameEmpty, told)
	}
	why := told
	if t.pages < pagesPerFrame {
		why |= ReasonPartial
	}
	if t.armed {
		why |= ReasonTracking
	}
	return makeFrame(FrameSmall, why)
}
