package memory_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// patterned is a source whose pages say which they are.
type patterned struct {
	seed  uint64
	row   uint64 // pages that are read together, 0 for one
	reads atomic.Uint64
	// before is called before each read, if not nil.
	before func(gfn memory.GFN)

	mu  sync.Mutex
	bad map[memory.GFN]error
}

func (p *patterned) page(gfn memory.GFN) []byte {
	b := make([]byte, page)
	for i := 0; i < page; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], (p.seed+uint64(gfn))*0x9e3779b97f4a7c15+uint64(i))
	}
	return b
}

func (p *patterned) ReadPages(gfn memory.GFN, dst []byte) error {
	if p.before != nil {
		p.before(gfn)
	}
	p.reads.Add(1)
	for ; len(dst) > 0; dst, gfn = dst[page:], gfn+1 {
		p.mu.Lock()
		err := p.bad[gfn]
		p.mu.Unlock()
		if err != nil {
			return err
		}
		copy(dst, p.page(gfn))
	}
	return nil
}

func (p *patterned) Row(gfn memory.GFN) memory.Range {
	row := max(1, p.row)
	first := uint64(gfn) / row * row
	return memory.Range{Start: memory.GFN(first).GPA(), Size: row * page}
}

// setOf is the set of some ranges.
func setOf(s *memory.Space, ranges ...memory.Range) *memory.PageSet {
	set := s.NewPageSet()
	for _, r := range ranges {
		set.Add(r.Start, r.Size)
	}
	return set
}

// missing lets pages wait, or skips where nobody may serve KVM's faults.
func missing(t testing.TB, s *memory.Space, src memory.PageSource, waiting []memory.Range, o memory.MissingOptions) *memory.Missing {
	t.Helper()
	m, err := s.OpenMissing(src, setOf(s, waiting...), o)
	if errors.Is(err, memory.ErrUnsupported) {
		t.Skipf("%v; try: run as root", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// sink is a file that the kernel copies guest memory to: faults are its own.
type sink struct{ *os.File }

func newSink(t testing.TB) sink {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "sink")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return sink{f}
}

// read returns guest memory as the kernel finds it.
func (f sink) read(s *memory.Space, r memory.Range) ([]byte, error) {
	if _, err := unix.Pwrite(int(f.Fd()), memory.Raw(s, r), 0); err != nil {
		return nil, err
	}
	b := make([]byte, r.Size)
	_, err := f.ReadAt(b, 0)
	return b, err
}

// within runs f, which must not hang.
func within(t *testing.T, what string, f func() error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- f() }()
	select {
	case err := <-done:
		if err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	case <-time.After(time.Minute):
		buf := make([]byte, 1<<20)
		t.Fatalf("%s hangs\n%s", what, buf[:runtime.Stack(buf, true)])
	}
}

// layout is guest memory whose pages are a file's, wait, or are zeros, in rows of
// random lengths, and what they must hold.
type layout struct {
	space   *memory.Space
	src     *patterned
	path    string // of the file
	file    []byte
	mapped  []memory.FileRange
	waiting []memory.Range
	want    []byte
}

func newLayout(t testing.TB, config memory.Config, seed uint64) *layout {
	t.Helper()
	l := &layout{space: newSpace(t, config), src: &patterned{seed: seed, row: 8}, want: make([]byte, config.Size), path: filepath.Join(t.TempDir(), "file")}
	rng := rand.New(rand.NewPCG(seed, 1))
	l.file = make([]byte, config.Size/2)
	for i := range l.file {
		l.file[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(l.path, l.file, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at := uint64(0); at < config.Size; {
		n := min((1+rng.Uint64N(40))*page, config.Size-at)
		if rng.IntN(20) == 0 {
			n = min(2*frame+n, config.Size-at)
		}
		r := memory.Range{Start: memory.GPA(at), Size: n}
		switch rng.IntN(3) {
		case 0:
			if n <= uint64(len(l.file)) {
				off := rng.Uint64N((uint64(len(l.file))-n)/page+1) * page
				l.mapped = append(l.mapped, memory.FileRange{Range: r, File: f, Offset: int64(off)})
				copy(l.want[at:at+n], l.file[off:])
			}
		case 1:
			l.waiting = append(l.waiting, r)
			for gfn := r.Start.GFN(); gfn < r.End().GFN(); gfn++ {
				copy(l.want[gfn.GPA():], l.src.page(gfn))
			}
		}
		at += n
	}
	if err := l.space.MapFiles(l.mapped...); err != nil {
		t.Fatal(err)
	}
	return l
}

// check compares all of memory with what it must hold, and that the file is what
// it was.
func (l *layout) check(t *testing.T) {
	t.Helper()
	got, err := l.space.View(0, uint64(len(l.want)))
	if err != nil {
		t.Fatal(err)
	}
	for at := 0; at < len(got); at += page {
		if !bytes.Equal(got[at:at+page], l.want[at:at+page]) {
			t.Fatalf("page %#x differs", at/page)
		}
	}
	if now, err := os.ReadFile(l.path); err != nil || !bytes.Equal(now, l.file) {
		t.Fatalf("the file was changed, %v", err)
	}
}

// TestMissing: memory is what it must be, whoever touches it in whatever order,
// while it is filled and given back and the runtime collects garbage.
func TestMissing(t *testing.T) {
	for _, track := range []string{"never", "before", "later"} {
		t.Run("track "+track, func(t *testing.T) {
			l := newLayout(t, memory.Config{Size: 16 * frame}, 7)
			m := missing(t, l.space, l.src, l.waiting, memory.MissingOptions{TrackWrites: track == "before"})
			if track != "never" {
				open(t, l.space, memory.TrackerWPAsync)
			}
			before := m.Stats()
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var hands, garbage sync.WaitGroup
			garbage.Go(func() {
				for ctx.Err() == nil {
					runtime.GC()
				}
			})
			errs := make(chan error, 8)
			// Every hand has pages of its own: every eighth of 64 KiB.
			const piece = 16 * page
			for hand := range 6 {
				f := newSink(t)
				hands.Go(func() {
					rng := rand.New(rand.NewPCG(uint64(hand), 2))
					for range 300 {
						at := uint64(hand)*piece + rng.Uint64N(uint64(len(l.want))/(8*piece))*8*piece
						r := memory.Range{Start: memory.GPA(at + rng.Uint64N(16)*page), Size: page}
						want := l.want[r.Start:r.End()]
						var err error
						var got []byte
						switch kind := rng.IntN(10); {
						case kind < 4:
							got, err = l.space.View(r.Start, r.Size)
						case kind < 8:
							got, err = f.read(l.space, r)
						case kind == 8:
							clear(want)
							err = l.space.Discard(r.Start, r.Size)
							got = want
						default:
							_, _ = rand.NewChaCha8([32]byte{byte(hand)}).Read(want)
							err = l.space.WriteAt(want, r.Start)
							got = want
						}
						if err == nil && !bytes.Equal(got, want) {
							err = fmt.Errorf("page %s differs", r.Start.GFN())
						}
						if err != nil {
							errs <- err
							return
						}
					}
				})
			}
			hands.Go(func() {
				if err := m.Run(ctx, 64<<20); err != nil {
					errs <- err
				}
			})
			within(t, "touching memory", func() error { hands.Wait(); return nil })
			cancel()
			garbage.Wait()
			select {
			case err := <-errs:
				t.Fatal(err)
			default:
			}
			l.check(t)
			if s := m.Stats(); !m.Done() || s.Waiting != 0 || s.Copied == 0 || s.Copied > before.Waiting || s.Faults == 0 {
				t.Errorf("at the end %+v, of %+v", s, before)
			}
		})
	}
}

// TestMissingIsComplete: when all has come, nothing depends on the source.
func TestMissingIsComplete(t *testing.T) {
	l := newLayout(t, memory.Config{Size: 8 * frame}, 3)
	m := missing(t, l.space, l.src, l.waiting, memory.MissingOptions{})
	if err := m.Run(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	reads := l.src.reads.Load()
	l.check(t)
	f := newSink(t)
	if got, err := f.read(l.space, l.space.Regions()[0].Range); err != nil || !bytes.Equal(got, l.want) {
		t.Errorf("the kernel reads other bytes, %v", err)
	}
	if l.src.reads.Load() != reads {
		t.Error("the source was asked again")
	}
}

// TestDiscardMissing: pages that wait and are given back are zeros, and their
// neighbours come; a page that is being read meanwhile does not come back.
func TestDiscardMissing(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 4 * frame})
	src := &patterned{seed: 5, row: 32}
	all := memory.Range{Start: 0, Size: 4 * frame}
	m := missing(t, s, src, []memory.Range{all}, memory.MissingOptions{TrackWrites: true})
	open(t, s, memory.TrackerWPAsync)

	entered, leave := make(chan struct{}), make(chan struct{})
	var held, tail atomic.Bool
	src.before = func(gfn memory.GFN) {
		tail.Store(tail.Load() || gfn >= 2*frame/page)
		if gfn == 64 && held.CompareAndSwap(false, true) {
			close(entered)
			<-leave
		}
	}
	f := newSink(t)
	late := make(chan []byte, 1)
	go func() {
		got, err := f.read(s, memory.Range{Start: 70 * page, Size: page})
		if err != nil {
			t.Error(err)
		}
		late <- got
	}()
	<-entered
	within(t, "a discard", func() error { return s.Discard(70*page, page) })
	close(leave)
	if got := <-late; !bytes.Equal(got, make([]byte, page)) {
		t.Error("a page that was given back while it was read has old bytes")
	}
	for _, gfn := range []memory.GFN{0, 64, 69, 70, 71, 511, 512} {
		want := src.page(gfn)
		if gfn == 70 {
			clear(want)
		}
		if got, err := s.View(gfn.GPA(), page); err != nil || !bytes.Equal(got, want) {
			t.Errorf("page %s is another, %v", gfn, err)
		}
	}
	// Whole frames cost no read, and are as good as new.
	if err := s.Discard(2*frame, 2*frame); err != nil {
		t.Fatal(err)
	}
	got, err := f.read(s, memory.Range{Start: 2 * frame, Size: 2 * frame})
	if err != nil || !bytes.Equal(got, make([]byte, 2*frame)) {
		t.Errorf("frames that were given back are not zeros, %v", err)
	}
	if tail.Load() {
		t.Error("what is given back whole was read")
	}
	if w := m.Stats().Waiting; w >= 2*frame {
		t.Errorf("%d bytes wait", w)
	}
}

// TestMissingPopulated: what waits and what files hold is not taken for zeros.
func TestMissingPopulated(t *testing.T) {
	l := newLayout(t, memory.Config{Size: 4 * frame}, 11)
	m := missing(t, l.space, l.src, l.waiting, memory.MissingOptions{})
	check := func(when string) {
		t.Helper()
		held := l.space.NewPageSet()
		if err := l.space.Populated(l.space.Regions()[0].Range, func(r memory.Range) { held.Add(r.Start, r.Size) }); err != nil {
			t.Fatal(err)
		}
		for gfn := memory.GFN(0); gfn.GPA() < 4*frame; gfn++ {
			zero := bytes.Equal(l.want[gfn.GPA():][:page], make([]byte, page))
			if held.Has(gfn.GPA()) == zero {
				t.Fatalf("%s page %s: held %v, zero %v", when, gfn, !zero, zero)
			}
		}
	}
	check("before")
	if err := m.Fetch(t.Context(), memory.Range{Start: frame, Size: frame}); err != nil {
		t.Fatal(err)
	}
	check("meanwhile")
	if err := m.Run(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	check("after")
}

// TestMissingFails: who asks for a page that cannot be had gets an error, in the
// kernel too; the others come.
func TestMissingFails(t *testing.T) {
	broken := errors.New("slot 9 was altered")
	for _, by := range []string{"view", "kernel"} {
		t.Run(by, func(t *testing.T) {
			s := newSpace(t, memory.Config{Size: 2 * frame})
			src := &patterned{seed: 5, row: 32, bad: map[memory.GFN]error{9: broken}}
			heard := make(chan error, 2)
			m := missing(t, s, src, []memory.Range{{Start: 0, Size: 2 * frame}}, memory.MissingOptions{Failed: func(err error) { heard <- err }})
			f := newSink(t)
			if got, err := f.read(s, memory.Range{Start: 8 * page, Size: page}); err != nil || !bytes.Equal(got, src.page(8)) {
				t.Errorf("its neighbour: %v", err)
			}
			if len(heard) > 0 {
				t.Error("an error was told although nobody wants the page")
			}
			if by == "kernel" {
				within(t, "the kernel's access", func() error {
					if _, err := f.read(s, memory.Range{Start: 9 * page, Size: page}); !errors.Is(err, unix.EFAULT) {
						return fmt.Errorf("%w, want EFAULT", err)
					}
					return nil
				})
			}
			for range 2 {
				if _, err := s.View(9*page+100, 8); !errors.Is(err, broken) {
					t.Errorf("view: %v", err)
				}
			}
			if len(heard) != 1 || !errors.Is(<-heard, broken) {
				t.Error("the failure was not told once")
			}
			if err := m.Run(t.Context(), 0); err != nil {
				t.Errorf("the others: %v", err)
			}
			if got, err := s.View(10*page, page); err != nil || !bytes.Equal(got, src.page(10)) {
				t.Errorf("the page after it: %v", err)
			}
		})
	}
	// Nobody asks for it: it is passed over.
	s := newSpace(t, memory.Config{Size: 2 * frame})
	src := &patterned{bad: map[memory.GFN]error{9: broken}}
	m := missing(t, s, src, []memory.Range{{Start: 0, Size: frame}}, memory.MissingOptions{Failed: func(err error) { t.Error(err) }})
	if err := m.Run(t.Context(), 0); !errors.Is(err, broken) || m.Stats().Waiting != page {
		t.Errorf("%v, %+v", err, m.Stats())
	}
}

// TestMissingClear: memory that is emptied misses nothing.
func TestMissingClear(t *testing.T) {
	l := newLayout(t, memory.Config{Size: 8 * frame}, 13)
	m := missing(t, l.space, l.src, l.waiting, memory.MissingOptions{TrackWrites: true})
	tr := open(t, l.space, memory.TrackerWPAsync)
	f := newFrames(t, l.space, tr)
	if err := m.Fetch(t.Context(), memory.Range{Start: 0, Size: frame}); err != nil {
		t.Fatal(err)
	}
	if err := l.space.Clear(); err != nil {
		t.Fatal(err)
	}
	reads := l.src.reads.Load()
	clear(l.want)
	l.check(t)
	if l.src.reads.Load() != reads || !m.Done() {
		t.Error("something is fetched for empty memory")
	}
	usage, err := l.space.HostUsage()
	if err != nil || usage.VMAs != 1 {
		t.Errorf("%d mappings, %v", usage.VMAs, err)
	}
	for gpa := memory.GPA(0); gpa < 8*frame; gpa += frame {
		if _, why, _ := f.At(gpa); why&memory.ReasonRemap != 0 {
			t.Errorf("frame %s is %s", gpa, why)
		}
	}
	if err := m.Run(t.Context(), 0); err != nil {
		t.Error(err)
	}
	all := l.space.Regions()[0].Range
	if err := tr.Collect(all, l.space.NewPageSet(), memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if err := l.space.WriteAt([]byte{1}, 3*frame); err != nil {
		t.Fatal(err)
	}
	got := l.space.NewPageSet()
	if err := tr.Collect(all, got, memory.Rearm); err != nil || !got.Has(3*frame) {
		t.Errorf("a write after it is not reported, %v", err)
	}
}

// TestMissingLarge: no huge page appears over a frame with holes, whoever asks
// for one, and frames may be large when they are complete.
func TestMissingLarge(t *testing.T) {
	needTHP(t)
	for _, track := range []bool{false, true} {
		s := newSpace(t, memory.Config{Size: 4 * frame})
		src := &patterned{seed: 5}
		m := missing(t, s, src, []memory.Range{{Start: 0, Size: frame}, {Start: 2*frame + 100*page, Size: 412 * page}}, memory.MissingOptions{TrackWrites: track})
		kind := memory.TrackerNone
		if track {
			kind = memory.TrackerWPAsync
		}
		f := newFrames(t, s, open(t, s, kind))
		want(t, f, 0, memory.FrameEmpty, memory.ReasonRemap)
		want(t, f, frame, memory.FrameEmpty, 0)
		// Half of the first frame, the hole of the third.
		if err := m.Fetch(t.Context(), memory.Range{Start: 0, Size: frame / 2}); err != nil {
			t.Fatal(err)
		}
		if err := s.WriteAt([]byte{1}, 2*frame+3*page); err != nil {
			t.Fatal(err)
		}
		for _, gpa := range []memory.GPA{0, 2 * frame} {
			mem := memory.Raw(s, memory.Range{Start: gpa, Size: frame})
			if err := unix.Madvise(mem, unix.MADV_COLLAPSE); err == nil {
				t.Errorf("frame %s was collapsed with holes", gpa)
			}
			if err := f.Collapse(gpa, 512); !errors.Is(err, memory.ErrFrameHeld) {
				t.Errorf("collapse of frame %s: %v", gpa, err)
			}
		}
		if usage, err := s.HostUsage(); err != nil || usage.AnonHugePages != 0 {
			t.Errorf("%d bytes are large, %v", usage.AnonHugePages, err)
		}
		if err := m.Run(t.Context(), 0); err != nil {
			t.Fatal(err)
		}
		if _, why, _ := f.At(0); why&memory.ReasonRemap != 0 {
			t.Errorf("the frame that is complete is held: %s", why)
		}
		if err := f.Refresh(s.Regions()[0].Range); err != nil {
			t.Fatal(err)
		}
		for _, gpa := range []memory.GPA{0, 2 * frame} {
			if err := f.Collapse(gpa, 512); err != nil {
				t.Errorf("collapse of frame %s: %v", gpa, err)
			}
		}
		agree(t, s, f)
		want(t, f, 0, memory.FrameLarge, 0)
		want(t, f, 2*frame, memory.FrameLarge, 0)
		for _, gfn := range []memory.GFN{0, 256, 511, 1124, 1535} {
			if got, err := s.View(gfn.GPA(), page); err != nil || !bytes.Equal(got, src.page(gfn)) {
				t.Errorf("page %s is another, %v", gfn, err)
			}
		}
		// Given back, it is an ordinary frame again.
		if err := s.Discard(0, frame); err != nil {
			t.Fatal(err)
		}
		if err := s.WriteAt([]byte{1}, 0); err != nil {
			t.Fatal(err)
		}
		agree(t, s, f)
		want(t, f, 0, memory.FrameLarge, 0)
	}
}

// TestMissingRecorded: what was asked for is recorded, and not its neighbours.
func TestMissingRecorded(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 4 * frame})
	src := &patterned{row: 32}
	m := missing(t, s, src, []memory.Range{{Start: 0, Size: 4 * frame}}, memory.MissingOptions{})
	if m.Recorded() != nil {
		t.Error("a record that nobody began")
	}
	m.Record()
	f := newSink(t)
	if _, err := f.read(s, memory.Range{Start: 5 * page, Size: page}); err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(100*page+5, page); err != nil {
		t.Fatal(err)
	}
	if _, err := s.View(2*frame, frame); err != nil { // who looks at memory
		t.Fatal(err)
	}
	if err := m.Run(t.Context(), 0); err != nil {
		t.Fatal(err)
	}
	got := m.Recorded()
	if n := got.Count(); n != 3 || !got.Has(5*page) || !got.Has(100*page) || !got.Has(101*page) {
		t.Errorf("%d pages are recorded", n)
	}
}

// TestMissingWritten: a page that was written before it was said to be missing
// keeps what was written.
func TestMissingWritten(t *testing.T) {
	s := newSpace(t, memory.Config{Size: frame, HugePages: memory.HugePagesOff})
	src := &patterned{row: 32}
	if err := s.WriteAt([]byte("written"), 40*page); err != nil {
		t.Fatal(err)
	}
	m := missing(t, s, src, []memory.Range{{Start: 0, Size: frame}}, memory.MissingOptions{})
	if err := m.Run(t.Context(), 0); err != nil || !m.Done() {
		t.Fatal(err)
	}
	for _, gfn := range []memory.GFN{39, 40, 41} {
		want := src.page(gfn)
		if gfn == 40 {
			clear(want)
			copy(want, "written")
		}
		if got, err := s.View(gfn.GPA(), page); err != nil || !bytes.Equal(got, want) {
			t.Errorf("page %s is another, %v", gfn, err)
		}
	}
}

// TestMissingRefused: memory that cannot be filled by pages is refused, and files
// and missing pages do not share a page.
func TestMissingRefused(t *testing.T) {
	shared := newSpace(t, memory.Config{Size: frame, Backing: memory.Memfd})
	if _, err := shared.OpenMissing(&patterned{}, shared.NewPageSet(), memory.MissingOptions{}); !errors.Is(err, memory.ErrNotPrivate) {
		t.Errorf("a memfd: %v", err)
	}
	if err := shared.MapFiles(); !errors.Is(err, memory.ErrNotPrivate) {
		t.Errorf("files over a memfd: %v", err)
	}
	l := newLayout(t, memory.Config{Size: 4 * frame}, 3)
	if _, err := l.space.OpenMissing(l.src, setOf(l.space, l.mapped[0].Range), memory.MissingOptions{}); !errors.Is(err, unix.EINVAL) && !errors.Is(err, memory.ErrUnsupported) {
		t.Errorf("pages of a file: %v", err)
	}
	if _, err := l.space.OpenMissing(l.src, shared.NewPageSet(), memory.MissingOptions{}); !errors.Is(err, unix.EINVAL) && !errors.Is(err, memory.ErrUnsupported) {
		t.Errorf("pages of another memory: %v", err)
	}
	missing(t, l.space, l.src, l.waiting, memory.MissingOptions{})
	again, err := os.Open(l.path)
	if err != nil {
		t.Fatal(err)
	}
	defer again.Close()
	if err := l.space.MapFiles(memory.FileRange{Range: l.waiting[0], File: again}); !errors.Is(err, unix.EBUSY) {
		t.Errorf("a file over missing pages: %v", err)
	}
}

// TestMissingTwice: two fetch one page, and the source does not have it any more
// when it answers the second. Nothing is missing, so nothing has failed.
func TestMissingTwice(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 4 << 20})
	started, placed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	src := &patterned{seed: 3, bad: map[memory.GFN]error{}}
	src.before = func(gfn memory.GFN) {
		late := false
		once.Do(func() { late = true })
		if !late {
			return
		}
		close(started)
		<-placed
		src.mu.Lock()
		defer src.mu.Unlock()
		src.bad[gfn] = errors.New("it is gone")
	}
	r := memory.Range{Start: 5 * page, Size: page}
	m := missing(t, s, src, []memory.Range{r}, memory.MissingOptions{Failed: func(err error) { t.Error(err) }})
	first := make(chan error, 1)
	go func() { first <- m.Fetch(context.Background(), r) }()
	<-started
	if err := m.Fetch(t.Context(), r); err != nil {
		t.Error(err)
	}
	close(placed)
	if err := <-first; err != nil {
		t.Errorf("a page that is here has failed: %v", err)
	}
	if !m.Done() {
		t.Error("something is missing")
	}
	got := make([]byte, page)
	if err := s.ReadAt(got, r.Start); err != nil || !bytes.Equal(got, src.page(5)) {
		t.Errorf("wrong bytes, %v", err)
	}
}
