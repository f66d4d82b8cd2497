package trackertest_test

import (
	"errors"
	"math/rand/v2"
	"testing"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

// TestFrames breaks, arms and collapses random frames under a running guest, on
// this machine's KVM.
func TestFrames(t *testing.T) { proveFrames(t, "frames") }

// TestLabFrames does the same where nested page tables map the guest.
func TestLabFrames(t *testing.T) {
	labtest.Need(t)
	proveFrames(t, "frames-npt")
}

// frameGuest is a writing guest whose frames are broken and collapsed, with
// three books of them: ditto's, the host's and KVM's.
type frameGuest struct {
	*machine
	frames  *memory.Frames
	mirror  *trackertest.Mirror
	working memory.Range // whole frames that the guest writes
	rng     *rand.Rand
	busy    int
}

func proveFrames(t *testing.T, id string) {
	operations, checks := labtest.Count(200, 1000), 0
	g := newFrameGuest(t, 128<<20)
	for n := range operations {
		g.operate()
		if n%100 == 99 {
			g.checkBooks()
			checks++
		}
	}
	g.settleAll()
	g.checkBooks()
	if n := g.workingLarge(); n != g.working.Size/frame {
		t.Errorf("%d of %d frames are large when every reason is gone", n, g.working.Size/frame)
	}
	g.finish()
	labtest.Proof(t, id, "%d breaks, armings and collapses (%d met a busy frame); at %d checks memory was what guest and mirror say, and ditto's book what smaps and KVM say",
		operations, g.busy, checks+1)
}

func newFrameGuest(t *testing.T, size uint64) *frameGuest {
	m := newMachine(t, memory.Config{Size: size}, memory.TrackerWPAsync)
	g := &frameGuest{
		machine: m, working: memory.Range{Start: guestStart, Size: size - guestStart},
		rng: rand.New(rand.NewPCG(8, 8)),
	}
	g.load(payload.MemWriterConfig{WorkingSet: g.working.Size, Order: payload.Random, Words: 2, Seed: 3})
	var err error
	if g.frames, err = memory.NewFrames(m.Memory, m.Tracker); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { g.frames.Close() })
	// Every frame is populated before the first of them is armed.
	for gpa := g.working.Start; gpa < g.working.End(); gpa += frame {
		if err := m.Memory.WriteAt([]byte{0}, gpa); err != nil {
			t.Fatal(err)
		}
	}
	if g.mirror, err = trackertest.NewMirror(m.Memory, m.Tracker); err != nil {
		t.Fatal(err)
	}
	m.Start()
	return g
}

// operate does one thing to a random frame while the guest writes.
func (g *frameGuest) operate() {
	g.t.Helper()
	n := g.working.Size / frame
	r := memory.Range{Start: g.working.Start + memory.GPA(g.rng.Uint64N(n))*frame, Size: frame}
	var err error
	switch g.rng.IntN(5) {
	case 0, 1:
		err = g.frames.Break(r.Start, memory.ReasonShared)
	case 2:
		// Every frame: what was written goes to the mirror before it is armed.
		_, err = g.mirror.Round(memory.Rearm)
	default:
		g.frames.Settle(r, memory.ReasonShared)
		err = g.frames.Collapse(r.Start, frame/page)
	}
	switch {
	case errors.Is(err, memory.ErrFrameBusy):
		g.busy++
	case err != nil:
		g.t.Error(err)
	}
}

// settleAll takes every reason away and makes every frame large.
func (g *frameGuest) settleAll() {
	g.t.Helper()
	for gpa := g.working.Start; gpa < g.working.End(); gpa += frame {
		r := memory.Range{Start: gpa, Size: frame}
		g.frames.Settle(r, memory.ReasonShared)
		// The guest's next write would break one that is large, but armed.
		if err := g.Tracker.Disarm(r); err != nil {
			g.t.Error(err)
		}
		err := memory.ErrFrameBusy
		for try := 0; errors.Is(err, memory.ErrFrameBusy) && try < 100; try++ {
			err = g.frames.Collapse(gpa, frame/page)
		}
		if err != nil {
			g.t.Error(err)
		}
	}
}

// checkBooks stops the guest and compares its memory with what it wrote and with
// the mirror, and how its frames are mapped with what smaps and KVM say:
//
//	ditto's book  large frames x 2 MiB  =  AnonHugePages of the mappings in smaps
//	              large frames of the working set  <=  pages_2m  <=  large frames
//	KVM           pages_4k + 512 pages_2m  >=  pages of the working set
//
// The guest has just read every page of its working set, so that KVM maps all of
// it; between its bounds pages_2m counts the frames below, which hold the
// program and its page tables and which KVM may map either way.
func (g *frameGuest) checkBooks() {
	g.t.Helper()
	if s := g.command(payload.CommandCheck, payload.StatePaused); s.Errors != 0 {
		g.t.Fatalf("the guest found %d errors in its memory", s.Errors)
	}
	if wrong, err := payload.VerifyMemWriter(g.Memory); wrong != 0 || err != nil {
		g.t.Fatalf("%d pages of the guest are wrong from outside (%v)", wrong, err)
	}
	all := g.Memory.Regions()[0].Range
	if err := g.frames.Refresh(all); err != nil {
		g.t.Fatal(err)
	}
	usage, err := g.Memory.HostUsage()
	if err != nil {
		g.t.Fatal(err)
	}
	small, large := g.mapped()
	census, working := g.frames.Census(), g.workingLarge()
	if uint64(census.Large())*frame != usage.AnonHugePages {
		g.t.Errorf("the book says %d large frames, smaps %d", census.Large(), usage.AnonHugePages/frame)
	}
	if large < working || large > uint64(census.Large()) {
		g.t.Errorf("KVM maps %d frames large, the book says %d of the working set and %d in all", large, working, census.Large())
	}
	if pages := small + large*frame/page; pages < g.working.Size/page {
		g.t.Errorf("KVM maps %d pages (%d small, %d large frames), the guest has read %d", pages, small, large, g.working.Size/page)
	}
	if _, err := g.mirror.Round(memory.RearmSmall); err != nil {
		g.t.Fatal(err)
	}
	if err := g.mirror.Check(); err != nil {
		g.t.Fatal(err)
	}
	g.command(payload.CommandRun, payload.StateRunning)
}

// workingLarge counts the large frames of the working set in ditto's book.
func (g *frameGuest) workingLarge() (n uint64) {
	for gpa := g.working.Start; gpa < g.working.End(); gpa += frame {
		if state, _, ok := g.frames.At(gpa); ok && state == memory.FrameLarge {
			n++
		}
	}
	return n
}
