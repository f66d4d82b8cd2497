package memory

import (
	"context"
	"errors"
	"log/slog"
	"time"
)

// FramePolicy says how fast small frames become large again. Collapsing a frame
// copies 2 MiB and stops the guest on it for about a millisecond, and finding
// candidates reads page tables: both are bounded for each step.
type FramePolicy struct {
	Interval time.Duration // between steps
	Window   int           // frames looked at in a step
	Budget   int           // frames collapsed in a step, at most
	Fill     int           // missing pages of a frame that may be populated
}

// DefaultFramePolicy looks at 1 GiB and makes up to 20 MiB large in each tenth
// of a second: 16 GiB are looked through in 1.6 s, and 256 MiB are large again
// in 1.3 s, for at most a hundredth of a core's time of page-table walks.
func DefaultFramePolicy() FramePolicy {
	return FramePolicy{Interval: 100 * time.Millisecond, Window: 512, Budget: 10, Fill: 64}
}

// longestPause bounds how far the policy backs off from a host that has no huge
// pages.
const longestPause = 64

// KeeperShare bounds what work beside the guest takes of a core: a step is
// followed by a rest of so many times its length, which a slow host needs.
const KeeperShare = 10

// FrameKeeper makes frames large again whose reason has gone. Its methods are
// called by one goroutine.
type FrameKeeper struct {
	frames *Frames
	policy FramePolicy
	log    *slog.Logger

	next int  // the cursor: number of the frame where the next window begins
	told bool // that the host has no huge pages
}

// NewFrameKeeper returns a keeper of the frames.
func NewFrameKeeper(f *Frames, p FramePolicy, log *slog.Logger) *FrameKeeper {
	return &FrameKeeper{frames: f, policy: p, log: log}
}

// Run steps until ctx ends. When the host is out of huge pages it says so once
// and tries ever more rarely.
func (k *FrameKeeper) Run(ctx context.Context) {
	pause := time.Duration(1)
	timer := time.NewTimer(k.policy.Interval)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-timer.C:
		}
		began := time.Now()
		switch n, err := k.Step(); {
		case n > 0:
			pause, k.told = 1, false
		case err == nil:
			pause = 1
		default:
			pause = min(pause*2, longestPause)
			if !k.told {
				k.told = true
				k.log.Warn("guest memory stays mapped with small pages for now", "err", err)
			}
		}
		timer.Reset(max(k.policy.Interval*pause, KeeperShare*time.Since(began)))
	}
}

// Step looks at the next window of frames, collapses those that are small
// without a reason, within the budget, and returns how many. Busy frames are
// passed over until the cursor comes by again. It stops with an error when the
// host has no huge pages: none free ([ErrNoHugePage]), or none at all.
func (k *FrameKeeper) Step() (collapsed int, err error) {
	if k.frames.space.config.HugePages != HugePagesTHP {
		return 0, nil
	}
	for left := min(k.policy.Window, k.frames.count()); left > 0 && collapsed < k.policy.Budget; {
		k.next %= k.frames.count()
		first := k.next
		done, err := k.window(left, k.policy.Budget-collapsed)
		collapsed += done
		if err != nil {
			return collapsed, err
		}
		left -= k.next - first
	}
	return collapsed, nil
}

// window looks at up to n frames from the cursor, as far as they lie in its
// region, collapses up to budget of them and moves the cursor behind the last it
// looked at.
func (k *FrameKeeper) window(n, budget int) (collapsed int, err error) {
	f := k.frames
	region, first := 0, k.next
	for first >= len(f.regions[region]) {
		first -= len(f.regions[region])
		region++
	}
	n = min(n, len(f.regions[region])-first)
	base := f.space.regions[region].Start + GPA(first)*LargeFrameSize
	if err := f.Refresh(Range{Start: base, Size: uint64(n) * LargeFrameSize}); err != nil {
		return 0, err
	}
	for i := 0; i < n && collapsed < budget; i++ {
		k.next++
		gpa := base + GPA(i)*LargeFrameSize
		if !k.candidate(gpa) {
			continue
		}
		switch err := f.Collapse(gpa, k.policy.Fill); {
		case err == nil:
			collapsed++
		case errors.Is(err, ErrFrameBusy), errors.Is(err, ErrFrameHeld):
		default:
			return collapsed, err
		}
	}
	return collapsed, nil
}

// candidate reports whether the frame may be made large: it is small, and at
// most partly populated.
func (k *FrameKeeper) candidate(gpa GPA) bool {
	state, why, ok := k.frames.At(gpa)
	return ok && state == FrameSmall && why&^ReasonPartial == 0
}
