package names

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/memory"
)

// stage is memory of large frames with the kernel's tracker, and a disk.
type stage struct {
	t      testing.TB
	space  *memory.Space
	table  *Table
	watch  *Watched
	frames *memory.Frames
	prover *Prover
	layer  LayerID
	disk   []byte
	log    bytes.Buffer
	clock  time.Time
}

const stageFrames = 4

// newStage fills all of memory, as a guest that has used it, and makes it large.
func newStage(t testing.TB, kind memory.TrackerKind, quiet time.Duration) *stage {
	t.Helper()
	return newStageOf(t, kind, quiet, stageFrames)
}

// newStageOf is newStage with so many frames.
func newStageOf(t testing.TB, kind memory.TrackerKind, quiet time.Duration, frames uint64) *stage {
	t.Helper()
	s := &stage{t: t, clock: time.Unix(1000, 0), disk: make([]byte, 8<<20)}
	var err error
	if s.space, err = memory.New(memory.Config{Size: frames * memory.LargeFrameSize}); err != nil {
		t.Fatal(err)
	}
	tracker, _, err := memory.OpenTracker(s.space, kind, memory.TrackerHost{})
	if errors.Is(err, memory.ErrUnsupported) {
		s.space.Close()
		t.Skipf("%v; try: a kernel of 6.7 or newer that allows userfaultfd", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	s.table = NewTable(s.space)
	s.watch = Watch(s.space, tracker, s.table)
	s.space.SetObserver(s.watch)
	if s.frames, err = memory.NewFrames(s.space, tracker); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.space.SetObserver(nil)
		if err := errors.Join(s.frames.Close(), s.watch.Close(), s.space.Close()); err != nil {
			t.Error(err)
		}
	})
	for i := range s.disk {
		s.disk[i] = byte(i/BlockSize*7 + i)
	}
	s.layer, err = s.table.AddLayer(Layer{Title: "disk", Size: int64(len(s.disk)), Source: bytes.NewReader(s.disk)})
	if err != nil {
		t.Fatal(err)
	}
	policy := DefaultProverPolicy()
	policy.Quiet, policy.Hashes, policy.Collapse, policy.Read = quiet, 100, 100, 1<<30
	s.prover = NewProver(s.space, s.table, s.watch, s.frames, policy, slog.New(slog.NewTextHandler(&s.log, nil)))
	s.prover.now = func() time.Time { return s.clock }
	return s
}

// fill populates frames [0, n) and makes them large.
func (s *stage) fill(n int) {
	s.t.Helper()
	for frame := range n {
		gpa := memory.GPA(frame) * memory.LargeFrameSize
		for p := range memory.GPA(pagesOfFrame) {
			s.view((gpa + p*memory.PageSize).GFN())[0]++
		}
		if err := s.frames.Collapse(gpa, 0); err != nil {
			s.t.Skipf("%v; try: free memory on the host", err)
		}
	}
	if got := s.large(); got != n {
		s.t.Fatalf("%d frames are large, want %d", got, n)
	}
}

func (s *stage) large() int {
	s.t.Helper()
	for _, r := range s.space.Regions() {
		if err := s.frames.Refresh(r.Range); err != nil {
			s.t.Fatal(err)
		}
	}
	return s.frames.Census().Large()
}

func (s *stage) view(gfn memory.GFN) []byte {
	s.t.Helper()
	b, err := s.space.View(gfn.GPA(), memory.PageSize)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// read brings n blocks into pages, as a device does.
func (s *stage) read(page, block, n uint64) {
	mem := pages(page, n)
	off := int64(block) * BlockSize
	s.table.BeginRead(s.layer, off, mem)
	for i := range n {
		copy(s.view(memory.GFN(page+i)), s.disk[off+int64(i)*BlockSize:][:BlockSize])
	}
	s.space.Wrote(mem[0].Start, mem[0].Size)
	s.table.EndRead(s.layer, off, mem, true)
}

// steps lets the prover step n times, a second each.
func (s *stage) steps(n int) {
	s.t.Helper()
	for range n {
		if _, err := s.prover.Step(context.Background()); err != nil {
			s.t.Fatal(err)
		}
		s.clock = s.clock.Add(time.Second)
	}
}

func (s *stage) settle() {
	s.t.Helper()
	if err := s.prover.Settle(context.Background()); err != nil {
		s.t.Fatal(err)
	}
}

// want checks how many names there are, how many are proven, and that these
// are true.
func (s *stage) want(named, proven uint64) {
	s.t.Helper()
	got := s.table.Stats()
	if got.Named != named || got.NamedProven != proven {
		s.t.Fatalf("%d names, %d proven, want %d and %d (%+v)", got.Named, got.NamedProven, named, proven, got)
	}
	for page := range uint32(s.table.pages) {
		gfn := s.table.gpa(page).GFN()
		if n := s.table.At(gfn); n.Proven() && !bytes.Equal(s.view(gfn), s.disk[n.Number()*BlockSize:][:BlockSize]) {
			s.t.Errorf("page %s is not %s", gfn, n)
		}
	}
}

func TestProverKeepsFramesLarge(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, time.Second)
	s.fill(stageFrames)
	s.read(3, 100, 200)   // in frame 0
	s.read(1000, 400, 60) // in frames 1 and 2
	s.want(260, 0)
	s.steps(2)
	s.want(260, 0) // not quiet for long enough
	s.steps(3)
	s.settle()
	s.want(260, 260)
	if got := s.large(); got != stageFrames {
		t.Fatalf("proving left %d of %d frames large", got, stageFrames)
	}

	// A write loses its page its name, and the frame breaks.
	s.view(50)[17]++
	s.settle()
	s.want(259, 259)
	if got := s.large(); got != stageFrames-1 {
		t.Fatalf("%d frames are large after a write", got)
	}
	// Once quiet the frame is large again, and what was not written is proven.
	s.steps(8)
	s.settle()
	s.want(259, 259)
	if got := s.large(); got != stageFrames {
		t.Errorf("%d of %d frames are large again", got, stageFrames)
	}
	if got := s.table.Stats(); got.DroppedWritten != 1 || got.Refuted != 0 {
		t.Errorf("stats are %+v", got)
	}

	// A frame without names is not armed any longer.
	s.space.Wrote(0, memory.LargeFrameSize)
	s.steps(3)
	s.view(7)[0]++
	if got := s.large(); got != stageFrames {
		t.Errorf("a write into a frame without names broke it: %d are large", got)
	}
}

func TestProverLeavesBusyFramesAlone(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, time.Second)
	s.fill(2)
	s.read(3, 100, 100)
	for range 20 {
		s.view(400)[0]++
		s.steps(1)
	}
	s.want(100, 0)
	if got := s.large(); got != 2 {
		t.Errorf("%d of 2 frames are large", got)
	}
	// Its patience has grown, but it comes round.
	s.steps(2 << mostPatience)
	s.want(100, 100)
}

func TestProverRefutes(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	s.read(3, 100, 4)
	s.view(4)[4095]++       // a vCPU's, which nobody saw
	s.disk[102*BlockSize]++ // a change behind everybody's back
	s.steps(3)
	s.want(2, 2)
	if got := s.table.Stats(); got.Refuted != 2 || got.Proven != 2 {
		t.Errorf("stats are %+v", got)
	}
}

// TestProverSmallFrames: in frames that cannot be large single pages are armed.
func TestProverSmallFrames(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	if err := s.frames.Break(0, memory.ReasonShared); err != nil {
		t.Fatal(err)
	}
	s.read(3, 100, 20)
	if err := s.frames.Break(0, memory.ReasonShared); err != nil {
		t.Fatal(err)
	}
	s.steps(3)
	s.want(20, 20)
	s.view(5)[0]++
	s.settle()
	s.want(19, 19)
}

// TestProverPartlyPopulated: a frame with holes is proven by pages; once it is
// full it is made large.
// TestProverLeavesMapped: names of pages that are mapped from files stay as they
// are, and the pages where they are.
func TestProverLeavesMapped(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	s.read(0, 0, 4)
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, s.disk, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	frame := memory.Range{Start: memory.LargeFrameSize, Size: memory.LargeFrameSize}
	if err := s.space.MapFiles(memory.FileRange{Range: frame, File: f}); err != nil {
		t.Fatal(err)
	}
	for i := range uint64(pagesOfFrame) {
		if !s.table.Record(frame.Start+memory.GPA(i*memory.PageSize), OfBlock(s.layer, i)) {
			t.Fatalf("page %d is not recorded", i)
		}
	}
	s.steps(20)
	s.want(pagesOfFrame+4, 4)
	err = s.space.FilesTouched(func(r memory.Range) {
		t.Errorf("%d pages at %s were brought into memory", r.Size/memory.PageSize, r.Start)
	})
	if err != nil {
		t.Fatal(err)
	}
}

func TestProverPartlyPopulated(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	// A balloon that took most of it and has gone again.
	if err := s.space.Discard(100<<12, 400<<12); err != nil {
		t.Fatal(err)
	}
	s.read(3, 100, 20)
	s.steps(4)
	s.want(20, 20)
	if state, why, _ := s.frames.At(0); state != memory.FrameSmall || why&memory.ReasonPartial == 0 {
		t.Fatalf("the frame is %s: %s", state, why)
	}
	for p := range memory.GFN(512) {
		if p >= 100 {
			s.view(p)[0] = 1
		}
	}
	s.steps(8 << mostPatience)
	if got := s.large(); got != 1 {
		state, why, _ := s.frames.At(0)
		t.Errorf("the frame is %s: %s", state, why)
	}
	s.want(20, 20)
}

// errReader is a disk that cannot be read.
type errReader struct{}

func (errReader) ReadAt([]byte, int64) (int, error) { return 0, io.ErrNoProgress }

func TestProverUnreadableLayer(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	broken, err := s.table.AddLayer(Layer{Title: "broken", Size: 1 << 20, Source: errReader{}})
	if err != nil {
		t.Fatal(err)
	}
	s.table.Record(0x3000, OfBlock(broken, 1))
	s.table.Record(0x4000, OfBlock(broken, 2))
	s.read(10, 100, 4)
	s.steps(10)
	s.want(6, 4)
	if n := strings.Count(s.log.String(), "cannot be read"); n != 1 {
		t.Errorf("told %d times:\n%s", n, &s.log)
	}
}

func TestProverWithoutTracker(t *testing.T) {
	s := newStage(t, memory.TrackerNone, 0)
	s.read(3, 100, 20)
	if s.prover.Active() {
		t.Error("the prover proves without a tracker")
	}
	s.steps(3)
	s.settle()
	s.want(20, 0)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	s.prover.Run(ctx) // returns at once
}

// TestProverRun runs as a VM's does, while pages are read and written.
func TestProverRun(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(stageFrames)
	s.prover.policy.Interval = time.Microsecond
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.prover.Run(ctx)
	}()
	for i := range uint64(3000) {
		s.read(i*37%2000, i*53%2000, 1+i%40)
		if i%3 == 0 {
			s.view(memory.GFN(i * 11 % 2048))[i%4096]++
		}
		if i%100 == 0 {
			s.settle()
		}
	}
	for s.table.Stats().NamedProven == 0 {
		time.Sleep(time.Millisecond)
	}
	cancel()
	<-done
	s.settle()
	got := s.table.Stats()
	s.want(got.Named, got.NamedProven)
	if err := s.table.invariants(); err != nil {
		t.Error(err)
	}
}

// TestSettleCancelled: a consumer that is cancelled gets fewer names, not wrong
// ones.
func TestSettleCancelled(t *testing.T) {
	s := newStage(t, memory.TrackerWPAsync, 0)
	s.fill(1)
	s.read(3, 100, 20)
	s.steps(3)
	s.want(20, 20)
	s.view(5)[0]++
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.prover.Settle(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("settle: %v", err)
	}
	s.want(20, 0)
}

// TestProverYields: while the guest computes, and only then, the prover rests
// longer, though there is no I/O.
func TestProverYields(t *testing.T) {
	for _, busy := range []bool{false, true} {
		s := newStage(t, memory.TrackerWPAsync, 0)
		s.prover.now = time.Now
		s.prover.policy.Interval = time.Millisecond
		ctx, stop := context.WithCancel(t.Context())
		var asked int
		var used time.Duration
		s.prover.used = func() time.Duration {
			if asked++; asked == 6 {
				stop()
			}
			if busy {
				used += time.Hour // since the last time
			}
			return used
		}
		s.prover.Run(ctx)
		if s.prover.busy != busy {
			t.Errorf("busy %v, want %v", s.prover.busy, busy)
		}
		if rest := s.prover.resting(); (rest == time.Duration(s.prover.policy.BusyRest)) != busy {
			t.Errorf("rests %d steps, busy %v", rest, busy)
		}
	}
}
