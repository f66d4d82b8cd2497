package memory_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// needTHP skips where the kernel gives no transparent huge pages.
func needTHP(t testing.TB) {
	t.Helper()
	mode, err := os.ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")
	if err != nil || bytes.Contains(mode, []byte("[never]")) {
		t.Skipf("no transparent huge pages (%s%v); try: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled", mode, err)
	}
}

// newFrames makes a book that the test closes.
func newFrames(t testing.TB, s *memory.Space, tr memory.Tracker) *memory.Frames {
	t.Helper()
	f, err := memory.NewFrames(s, tr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// agree refreshes the book and compares it with smaps.
func agree(t testing.TB, s *memory.Space, f *memory.Frames) memory.Census {
	t.Helper()
	for _, r := range s.Regions() {
		if err := f.Refresh(r.Range); err != nil {
			t.Fatal(err)
		}
	}
	usage, err := s.HostUsage()
	if err != nil {
		t.Fatal(err)
	}
	c := f.Census()
	if got := uint64(c.Large()) * frame; got != usage.AnonHugePages {
		t.Errorf("the book says %d bytes are large, smaps %d", got, usage.AnonHugePages)
	}
	return c
}

func want(t testing.TB, f *memory.Frames, gpa memory.GPA, state memory.FrameState, why memory.FrameReasons) {
	t.Helper()
	gotState, gotWhy, ok := f.At(gpa)
	if !ok || gotState != state || gotWhy != why {
		t.Errorf("frame %s is %s (%s), want %s (%s)", gpa, gotState, gotWhy, state, why)
	}
}

func digest(t testing.TB, s *memory.Space) [32]byte {
	t.Helper()
	mem, err := s.View(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(mem)
}

func TestFrameStates(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 8*frame + page})
	tr := open(t, s, memory.TrackerWPAsync)
	f := newFrames(t, s, tr)
	mem, err := s.Writable(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	want(t, f, 0, memory.FrameEmpty, 0)
	if _, _, ok := f.At(8 * frame); ok {
		t.Error("the part of a frame at the end counts as a frame")
	}
	for i := range 4 {
		mem[i*frame] = 1
	}
	if c := agree(t, s, f); c.Large() != 4 || c.Empty() != 4 || c.Frames != 8 {
		t.Errorf("census %+v, want 4 large and 4 empty", c)
	}

	// A read of a hole maps the zero page: the frame is still empty.
	read := func(at int) {
		t.Helper()
		if err := s.ReadAt(make([]byte, 1), memory.GPA(at)); err != nil {
			t.Fatal(err)
		}
	}
	read(5 * frame)
	if c := agree(t, s, f); c.Empty() != 4 {
		t.Errorf("census %+v after a read, want 4 empty", c)
	}

	// A discard of one page breaks its frame and leaves it partly populated.
	if err := s.Discard(frame, page); err != nil {
		t.Fatal(err)
	}
	agree(t, s, f)
	want(t, f, frame, memory.FrameSmall, memory.ReasonPartial)

	// A write to an armed frame breaks that frame alone, a read none.
	if err := tr.Arm(memory.Range{Start: 2 * frame, Size: 2 * frame}); err != nil {
		t.Fatal(err)
	}
	read(2 * frame)
	agree(t, s, f)
	want(t, f, 2*frame, memory.FrameLarge, 0)
	mem[2*frame+5*page]++
	agree(t, s, f)
	want(t, f, 2*frame, memory.FrameSmall, memory.ReasonTracking)
	want(t, f, 3*frame, memory.FrameLarge, 0)

	// Told reasons stand until they are settled, whatever the host says.
	f.Hold(memory.Range{Start: 3*frame + page, Size: page}, memory.ReasonBalloon)
	agree(t, s, f)
	want(t, f, 3*frame, memory.FrameLarge, memory.ReasonBalloon)
	f.Settle(memory.Range{Start: 3 * frame, Size: frame}, memory.ReasonBalloon)
	want(t, f, 3*frame, memory.FrameLarge, 0)
}

func TestBreakAndCollapse(t *testing.T) {
	needTHP(t)
	for _, armed := range []bool{false, true} {
		s := newSpace(t, memory.Config{Size: 4 * frame})
		tr := open(t, s, memory.TrackerWPAsync)
		f := newFrames(t, s, tr)
		fill(t, s)
		before := digest(t, s)
		if armed {
			if err := tr.Arm(memory.Range{Size: 4 * frame}); err != nil {
				t.Fatal(err)
			}
		}
		if err := f.Break(frame, memory.ReasonShared); err != nil {
			t.Fatal(err)
		}
		why := memory.ReasonShared
		if armed {
			why |= memory.ReasonTracking
		}
		want(t, f, frame, memory.FrameSmall, why)
		if c := agree(t, s, f); c.Large() != 3 || c.Because(memory.ReasonShared) != 1 {
			t.Errorf("census %+v, want one small frame", c)
		}
		if got := s.NewPageSet(); armed {
			if err := tr.Collect(memory.Range{Size: 4 * frame}, got, memory.Rearm); err != nil || got.Count() != 0 {
				t.Errorf("breaking an armed frame counts as %d written pages, %v", got.Count(), err)
			}
		}

		// The reason stands: refused.
		if err := f.Collapse(frame, 0); !errors.Is(err, memory.ErrFrameHeld) {
			t.Errorf("collapse of a held frame: %v, want ErrFrameHeld", err)
		}
		f.Settle(memory.Range{Start: frame, Size: frame}, memory.ReasonShared)
		if err := f.Collapse(frame, 0); err != nil {
			t.Fatal(err)
		}
		want(t, f, frame, memory.FrameLarge, 0)
		agree(t, s, f)
		if got := s.NewPageSet(); armed {
			err := tr.Collect(memory.Range{Size: 4 * frame}, got, memory.RearmSmall)
			if err != nil || got.Count() != frame/page || got.CountIn(frame, frame) != frame/page {
				t.Errorf("%d written pages after a collapse, want all of that frame (%v)", got.Count(), err)
			}
		}
		if digest(t, s) != before {
			t.Error("memory changed")
		}
	}
}

// TestCollapsePartial: pages are populated only when few are missing.
func TestCollapsePartial(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 2 * frame})
	f := newFrames(t, s, open(t, s, memory.TrackerWPAsync))
	fill(t, s)
	if err := s.Discard(page, 5*page); err != nil {
		t.Fatal(err)
	}
	before := digest(t, s)
	if err := f.Collapse(0, 4); !errors.Is(err, memory.ErrFrameHeld) {
		t.Errorf("collapse with 5 pages missing and 4 allowed: %v, want ErrFrameHeld", err)
	}
	want(t, f, 0, memory.FrameSmall, memory.ReasonPartial)
	if err := f.Collapse(0, 5); err != nil {
		t.Fatal(err)
	}
	want(t, f, 0, memory.FrameLarge, 0)
	if digest(t, s) != before {
		t.Error("memory changed")
	}
}

func TestFrameErrors(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 2*frame + page})
	f := newFrames(t, s, open(t, s, memory.TrackerNone))
	for _, gpa := range []memory.GPA{page, 2 * frame, memory.HoleStart, ^memory.GPA(0) &^ (frame - 1)} {
		var fe *memory.FrameError
		if err := f.Break(gpa, memory.ReasonShared); !errors.As(err, &fe) || !errors.Is(err, memory.ErrNotAFrame) {
			t.Errorf("break %s: %v, want ErrNotAFrame", gpa, err)
		}
		if err := f.Collapse(gpa, 0); !errors.Is(err, memory.ErrNotAFrame) {
			t.Errorf("collapse %s: %v, want ErrNotAFrame", gpa, err)
		}
	}
	if err := f.Break(0, memory.ReasonShared); err != nil {
		t.Errorf("break an empty frame: %v", err)
	}
	want(t, f, 0, memory.FrameEmpty, memory.ReasonShared)
	off := newSpace(t, memory.Config{Size: 2 * frame, HugePages: memory.HugePagesOff})
	fo := newFrames(t, off, open(t, off, memory.TrackerNone))
	if err := fo.Collapse(0, 0); !errors.Is(err, memory.ErrFrameFixed) {
		t.Errorf("collapse without huge pages: %v, want ErrFrameFixed", err)
	}
}

// TestFramesRandom breaks, writes, discards and collapses random frames while a
// goroutine writes, and compares memory with what it must hold.
func TestFramesRandom(t *testing.T) {
	needTHP(t)
	const frames = 32
	s := newSpace(t, memory.Config{Size: frames * frame})
	tr := open(t, s, memory.TrackerWPAsync)
	f := newFrames(t, s, tr)
	fill(t, s)
	mem, err := s.Writable(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	model := bytes.Clone(mem)
	stop, done := make(chan struct{}), make(chan uint64)
	go func() { // owns the last byte of every page
		for n := uint64(0); ; n++ {
			select {
			case <-stop:
				done <- n
				return
			default:
				mem[(n*7919)%(frames*frame/page)*page+page-1]++
			}
		}
	}()
	rng := rand.New(rand.NewPCG(4, 4))
	for range 1000 {
		gpa := memory.GPA(rng.IntN(frames)) * frame
		r := memory.Range{Start: gpa, Size: frame}
		var err error
		switch rng.IntN(6) {
		case 0:
			err = f.Break(gpa, memory.ReasonShared)
		case 1:
			err = tr.Arm(r)
		case 2:
			at := gpa + memory.GPA(rng.IntN(frame-page))&^(page-1)
			model[at]++
			err = s.WriteAt(model[at:at+1], at)
		case 3:
			err = tr.Disarm(r)
		case 4:
			f.Settle(r, memory.ReasonShared)
			if err = f.Collapse(gpa, 0); errors.Is(err, memory.ErrFrameBusy) {
				err = nil
			}
		case 5:
			err = tr.Collect(r, s.NewPageSet(), memory.Rearm)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	for n := range <-done {
		model[(n*7919)%(frames*frame/page)*page+page-1]++
	}
	if !bytes.Equal(model, mem) {
		t.Error("memory differs from the model")
	}
	c := agree(t, s, f)
	t.Logf("at the end: %d large, %d small, %d for tracking", c.Large(), c.Small(), c.Because(memory.ReasonTracking))
}

// TestFrameKeeper: everything without a reason becomes large, no faster than
// the budget, and what has a reason stays.
func TestFrameKeeper(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 16 * frame})
	f := newFrames(t, s, open(t, s, memory.TrackerWPAsync))
	fill(t, s)
	for i := range memory.GPA(16) {
		if err := f.Break(i*frame, memory.ReasonShared); err != nil {
			t.Fatal(err)
		}
	}
	if c := agree(t, s, f); c.Small() != 16 {
		t.Fatalf("census %+v, want 16 small", c)
	}
	f.Settle(memory.Range{Size: 12 * frame}, memory.ReasonShared)
	k := memory.NewFrameKeeper(f, memory.FramePolicy{Window: 7, Budget: 3, Fill: 0}, slog.New(slog.DiscardHandler))
	total := 0
	for range 12 {
		n, err := k.Step()
		if err != nil {
			t.Fatal(err)
		}
		if n > 3 {
			t.Errorf("%d frames in a step, budget 3", n)
		}
		total += n
	}
	c := agree(t, s, f)
	if total != 12 || c.Large() != 12 || c.Because(memory.ReasonShared) != 4 {
		t.Errorf("%d collapsed, census %+v, want 12 large and 4 shared", total, c)
	}
}

// TestFrameKeeperRun: the keeper ends with its context, and works until then.
func TestFrameKeeperRun(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 4 * frame})
	f := newFrames(t, s, open(t, s, memory.TrackerNone))
	fill(t, s)
	if err := f.Break(frame, memory.ReasonShared); err != nil {
		t.Fatal(err)
	}
	f.Settle(memory.Range{Size: 4 * frame}, memory.ReasonShared)
	p := memory.DefaultFramePolicy()
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*p.Interval)
		defer cancel()
		memory.NewFrameKeeper(f, p, slog.New(slog.DiscardHandler)).Run(ctx)
	})
	want(t, f, frame, memory.FrameLarge, 0)
}

// TestFrameKeeperGivesUp: on memory that gets no huge pages the keeper says so
// once and tries ever more rarely.
func TestFrameKeeperGivesUp(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 4 * frame})
	f := newFrames(t, s, open(t, s, memory.TrackerNone))
	mem, err := s.Writable(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(mem, unix.MADV_NOHUGEPAGE); err != nil {
		t.Fatal(err)
	}
	fill(t, s)
	var log bytes.Buffer
	p := memory.DefaultFramePolicy()
	k := memory.NewFrameKeeper(f, p, slog.New(slog.NewTextHandler(&log, nil)))
	if n, err := k.Step(); n != 0 || err == nil {
		t.Errorf("%d frames collapsed, error %v, want none and an error", n, err)
	}
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 1000*p.Interval)
		defer cancel()
		k.Run(ctx)
	})
	if n := strings.Count(log.String(), "level=WARN"); n != 1 {
		t.Errorf("%d warnings, want one: %s", n, log.String())
	}
}

func TestFrameStrings(t *testing.T) {
	for _, tt := range []struct{ got, want string }{
		{memory.FrameEmpty.String() + memory.FrameSmall.String() + memory.FrameLarge.String(), "emptysmalllarge"},
		{memory.FrameReasons(0).String(), "none"},
		{(memory.ReasonShared | memory.ReasonPartial).String(), "shared+partial"},
		{(&memory.FrameError{Op: "break", GPA: frame, Err: memory.ErrFrameBusy}).Error(), "break frame 0x200000: the frame is busy"},
	} {
		if tt.got != tt.want {
			t.Errorf("%q, want %q", tt.got, tt.want)
		}
	}
}

// TestHugePageRules pins what the kernel does to armed memory, on which the
// order of arming and collapsing rests.
func TestHugePageRules(t *testing.T) {
	needTHP(t)
	s := newSpace(t, memory.Config{Size: 4 * frame})
	tr := open(t, s, memory.TrackerWPAsync)
	f := newFrames(t, s, tr)
	mem, err := s.Writable(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	mem[0], mem[frame] = 1, 1
	all := memory.Range{Size: 4 * frame}

	// Holes are not armed: they can still become large, and then are reported.
	if err := tr.Arm(all); err != nil {
		t.Fatal(err)
	}
	mem[2*frame] = 1
	agree(t, s, f)
	want(t, f, 2*frame, memory.FrameLarge, 0)
	got := s.NewPageSet()
	for range 2 { // RearmSmall leaves the new large frame unarmed
		got.Clear()
		if err := tr.Collect(all, got, memory.RearmSmall); err != nil || got.CountIn(2*frame, frame) != frame/page || got.Count() != frame/page {
			t.Errorf("%d written pages, want one frame (%v)", got.Count(), err)
		}
	}
	if err := tr.Collect(all, got, memory.Rearm); err != nil {
		t.Fatal(err)
	}
	got.Clear()
	if err := tr.Collect(all, got, memory.Rearm); err != nil || got.Count() != 0 {
		t.Errorf("%d written pages after re-arming, want none (%v)", got.Count(), err)
	}
	agree(t, s, f)
	want(t, f, 2*frame, memory.FrameLarge, 0)

	// A part of a large frame is not armed: it would break the frame.
	if err := tr.Arm(memory.Range{Start: page, Size: page}); !errors.Is(err, memory.ErrPartOfLargeFrame) {
		t.Errorf("arm a part of a large frame: %v, want ErrPartOfLargeFrame", err)
	}
	if err := tr.Disarm(memory.Range{Start: page, Size: frame}); !errors.Is(err, memory.ErrPartOfLargeFrame) {
		t.Errorf("disarm a part of a large frame: %v, want ErrPartOfLargeFrame", err)
	}
	if c := agree(t, s, f); c.Large() != 3 {
		t.Errorf("census %+v, want 3 large", c)
	}
	// In a small frame it is, and MADV_COLLAPSE then refuses the frame.
	if err := tr.Disarm(all); err != nil {
		t.Fatal(err)
	}
	if err := f.Break(0, memory.ReasonShared); err != nil {
		t.Fatal(err)
	}
	if err := tr.Arm(memory.Range{Start: page, Size: page}); err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(mem[:frame], unix.MADV_COLLAPSE); err == nil {
		t.Error("MADV_COLLAPSE of a frame with an armed page succeeded: Collapse need not disarm")
	}
	// A whole frame that is discarded leaves a hole, which only the report tells.
	if err := tr.Arm(memory.Range{Start: frame, Size: frame}); err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(frame, frame); err != nil {
		t.Fatal(err)
	}
	got.Clear()
	if err := tr.Collect(memory.Range{Start: frame, Size: frame}, got, memory.Rearm); err != nil || got.Count() != frame/page {
		t.Errorf("%d written pages after a discard, want the frame (%v)", got.Count(), err)
	}
}

// TestRemapped: a new mapping must be made known.
func TestRemapped(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 4 * frame})
	tr := open(t, s, memory.TrackerWPAsync)
	fill(t, s)
	all, one := memory.Range{Size: 4 * frame}, memory.Range{Start: frame, Size: 4 * page}
	if err := tr.Arm(all); err != nil {
		t.Fatal(err)
	}
	if err := memory.Replace(s, one, -1); err != nil {
		t.Fatal(err)
	}
	got := s.NewPageSet()
	if err := tr.Collect(all, got, memory.Rearm); !errors.Is(err, memory.ErrNotRegistered) || got.CountIn(one.Start, one.Size) != 4 {
		t.Errorf("collect over an unknown mapping: %v and %d pages of it, want ErrNotRegistered and all", err, got.CountIn(one.Start, one.Size))
	}
	if err := tr.Remapped(one); err != nil {
		t.Fatal(err)
	}
	got.Clear()
	if err := tr.Collect(all, got, memory.Rearm); err != nil || got.CountIn(one.Start, one.Size) != 4 {
		t.Errorf("collect after Remapped: %v and %d pages of it, want all", err, got.CountIn(one.Start, one.Size))
	}
	if err := s.WriteAt([]byte{7}, one.Start); err != nil {
		t.Fatal(err)
	}
	got.Clear()
	if err := tr.Collect(one, got, memory.Rearm); err != nil || !got.Has(one.Start) {
		t.Errorf("a write to the new mapping was not reported (%v)", err)
	}
}

// TestRemappedFile: pages of a private file mapping count as unwritten until
// they are written, which gives them a page of their own.
func TestRemappedFile(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 2 * frame})
	tr := open(t, s, memory.TrackerWPAsync)
	f := newFrames(t, s, tr)
	fill(t, s)
	file, err := os.Create(filepath.Join(t.TempDir(), "image"))
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	content := bytes.Repeat([]byte("block of an image"), 8*page/16)[:8*page]
	if _, err := file.Write(content); err != nil {
		t.Fatal(err)
	}
	at := memory.Range{Start: frame + 64*page, Size: 8 * page}
	if err := memory.Replace(s, at, int(file.Fd())); err != nil {
		t.Fatal(err)
	}
	f.Hold(at, memory.ReasonRemap)
	if err := tr.Remapped(at); err != nil {
		t.Fatal(err)
	}
	all := memory.Range{Size: 2 * frame}
	collect := func(what string, want uint64) *memory.PageSet {
		t.Helper()
		got := s.NewPageSet()
		if err := tr.Collect(all, got, memory.Rearm); err != nil || got.CountIn(at.Start, at.Size) != want {
			t.Errorf("%s: %d pages of the file reported, want %d (%v)", what, got.CountIn(at.Start, at.Size), want, err)
		}
		return got
	}
	collect("new mapping", 8)
	mem, err := s.Writable(at.Start, at.Size)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(mem, content) {
		t.Fatal("the file is not mapped")
	}
	collect("read", 0)
	mem[3*page]++
	if got := collect("written", 1); !got.Has(at.Start + 3*page) {
		t.Error("the written page is not the one reported")
	}
	collect("armed again", 0)
	mem[3*page]++
	mem[4*page]++
	collect("written again", 2)
	if err := f.Refresh(all); err != nil {
		t.Fatal(err)
	}
	if _, why, _ := f.At(frame); why&memory.ReasonRemap == 0 {
		t.Errorf("the frame's reasons are %s, want remap among them", why)
	}
}

func TestFrameErrorText(t *testing.T) {
	if err := (&memory.TrackerError{Kind: memory.TrackerWPAsync, Reason: "x", Err: unix.ENOSYS}); !strings.Contains(err.Error(), "wp-async: x: ") {
		t.Errorf("error %q", err)
	}
}
