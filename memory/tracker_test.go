package memory_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

const (
	page  = memory.PageSize
	frame = memory.LargeFrameSize
)

// newSpace makes a Space that the test closes.
func newSpace(t testing.TB, config memory.Config) *memory.Space {
	t.Helper()
	s, err := memory.New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// open makes a tracker that the test closes. A kernel without it skips.
func open(t testing.TB, s *memory.Space, kind memory.TrackerKind) memory.Tracker {
	t.Helper()
	tr, _, err := memory.OpenTracker(s, kind, memory.TrackerHost{})
	if errors.Is(err, memory.ErrUnsupported) {
		t.Skipf("%v; try: Linux 6.7 or newer", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		s.SetObserver(nil)
		if err := tr.Close(); err != nil {
			t.Error(err)
		}
	})
	return tr
}

// fill writes every page of the Space, so that none is a hole.
func fill(t testing.TB, s *memory.Space) {
	t.Helper()
	for _, r := range s.Regions() {
		mem, err := s.Writable(r.Start, r.Size)
		if err != nil {
			t.Fatal(err)
		}
		for off := 0; off < len(mem); off += page {
			mem[off] = 1
		}
	}
}

func TestTrackerKindText(t *testing.T) {
	for k := memory.TrackerAuto; k <= memory.TrackerNone; k++ {
		text, err := k.MarshalText()
		var back memory.TrackerKind
		if err != nil || back.UnmarshalText(text) != nil || back != k {
			t.Errorf("%d: text %q read back as %d", k, text, back)
		}
		if k != memory.TrackerAuto && k.Misses() == "" {
			t.Errorf("%s does not say what it misses", k)
		}
	}
	var k memory.TrackerKind
	if err := k.UnmarshalText([]byte("soft-dirty")); err == nil {
		t.Error("an unknown tracker was accepted")
	}
}

func TestOpenTracker(t *testing.T) {
	s := newSpace(t, memory.Config{Size: frame})
	tr, passed, err := memory.OpenTracker(s, memory.TrackerAuto, memory.TrackerHost{})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("auto: %s, passed over %v", tr.Kind(), passed)
	s.SetObserver(nil)
	if err := tr.Close(); err != nil {
		t.Error(err)
	}
	for _, kind := range []memory.TrackerKind{memory.TrackerKVMLog, memory.TrackerKVMRing} {
		var te *memory.TrackerError
		if _, _, err := memory.OpenTracker(s, kind, memory.TrackerHost{}); !errors.As(err, &te) || !errors.Is(err, memory.ErrUnsupported) || te.Kind != kind {
			t.Errorf("%s without KVM: %v, want a TrackerError", kind, err)
		}
	}
	shared := newSpace(t, memory.Config{Size: frame, Backing: memory.Memfd})
	if _, _, err := memory.OpenTracker(shared, memory.TrackerWPAsync, memory.TrackerHost{}); !errors.Is(err, memory.ErrUnsupported) {
		t.Errorf("wp-async on a memfd: %v, want ErrUnsupported", err)
	}
	tr, passed, err = memory.OpenTracker(shared, memory.TrackerAuto, memory.TrackerHost{})
	if err != nil || tr.Kind() != memory.TrackerNone || len(passed) != 3 {
		t.Errorf("auto on a memfd without KVM: %v, %v, %v, want none and three reasons", tr, passed, err)
	}
}

func TestProbeTrackers(t *testing.T) {
	found, err := memory.ProbeTrackers(memory.TrackerHost{})
	if err != nil {
		t.Fatal(err)
	}
	if found[memory.TrackerNone] != nil || !errors.Is(found[memory.TrackerKVMLog], memory.ErrUnsupported) {
		t.Errorf("probe without KVM: %v", found)
	}
	if err := found[memory.TrackerWPAsync]; err != nil && !errors.Is(err, memory.ErrUnsupported) {
		t.Errorf("wp-async: %v, want nil or ErrUnsupported", err)
	}
}

// TestTrackerRanges: what is not a range of pages in one region is refused.
func TestTrackerRanges(t *testing.T) {
	for _, kind := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerNone} {
		t.Run(kind.String(), func(t *testing.T) {
			s := newSpace(t, memory.Config{Size: 3<<30 + frame})
			tr := open(t, s, kind)
			for _, r := range []memory.Range{{1, page}, {0, page + 1}, {memory.HoleStart - page, 2 * page}, {memory.HoleStart, page}, {^memory.GPA(0) - page + 1, 2 * page}} {
				for name, call := range map[string]func() error{
					"Arm":      func() error { return tr.Arm(r) },
					"Disarm":   func() error { return tr.Disarm(r) },
					"Remapped": func() error { return tr.Remapped(r) },
					"Collect":  func() error { return tr.Collect(r, s.NewPageSet(), memory.Rearm) },
				} {
					if call() == nil {
						t.Errorf("%s [%s, +%#x) succeeded", name, r.Start, r.Size)
					}
				}
			}
		})
	}
}

// TestBruteForce follows a Space through a tracker while goroutines write,
// the VMM writes and discards, and the kernel reads files into guest memory past
// the page cache.
func TestBruteForce(t *testing.T) {
	for _, kind := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerNone} {
		for _, huge := range []memory.HugePages{memory.HugePagesTHP, memory.HugePagesOff} {
			for _, mode := range []memory.CollectMode{memory.Rearm, memory.RearmSmall} {
				t.Run(fmt.Sprintf("%s/%s/mode%d", kind, huge, mode), func(t *testing.T) {
					bruteForce(t, kind, huge, mode)
				})
			}
		}
	}
}

func bruteForce(t *testing.T, kind memory.TrackerKind, huge memory.HugePages, mode memory.CollectMode) {
	const size = 16 * frame
	s := newSpace(t, memory.Config{Size: size, HugePages: huge})
	tr := open(t, s, kind)
	direct := directFile(t)
	// Half of memory is populated, the other half holes.
	mem, err := s.Writable(0, size)
	if err != nil {
		t.Fatal(err)
	}
	for off := 0; off < size/2; off += page {
		mem[off] = byte(off >> 12)
	}
	m, err := trackertest.NewMirror(s, tr)
	if err != nil {
		t.Fatal(err)
	}

	stop := make(chan struct{})
	var wg sync.WaitGroup
	// Each goroutine has pages of its own, so that the test has no data race.
	for k := range uint64(2) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(k, 1))
			for {
				select {
				case <-stop:
					return
				default:
				}
				p := rng.Uint64N(size/page/4)*4 + k
				mem[p*page+rng.Uint64N(page)]++
			}
		})
	}
	wg.Go(func() { vmmWrites(t, s, direct, stop) })
	for range 25 {
		if _, err := m.Round(mode); err != nil {
			t.Error(err)
			break
		}
	}
	close(stop)
	wg.Wait()
	if _, err := m.Round(mode); err != nil {
		t.Fatal(err)
	}
	if err := m.Check(); err != nil {
		t.Error(err)
	}
}

// vmmWrites does what devices do to pages 2 and 3 of each four.
func vmmWrites(t *testing.T, s *memory.Space, direct int, stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(9, 9))
	for i := uint64(0); ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		gpa := memory.GPA(rng.Uint64N(s.Size()/page/4)*4+2) * page
		switch i % 4 {
		case 0, 1:
			if err := s.WriteAt([]byte(fmt.Sprint(i)), gpa+memory.GPA(rng.IntN(page-20))); err != nil {
				t.Error(err)
			}
		case 2:
			if err := s.Discard(gpa, page); err != nil {
				t.Error(err)
			}
		case 3:
			if err := readDirect(s, direct, gpa, int64(rng.IntN(16))*page); err != nil {
				t.Error(err)
			}
		}
	}
}

// readDirect reads a page of a file into guest memory as virtio-blk does.
func readDirect(s *memory.Space, fd int, gpa memory.GPA, off int64) error {
	buf, err := s.Writable(gpa, page)
	if err != nil {
		return err
	}
	if n, err := unix.Pread(fd, buf, off); err != nil || n != page {
		return fmt.Errorf("read %d bytes with O_DIRECT: %w", n, err)
	}
	s.Wrote(gpa, page)
	return nil
}

// directFile opens a file of 16 random pages with O_DIRECT.
func directFile(t *testing.T) int {
	t.Helper()
	path := filepath.Join(t.TempDir(), "direct")
	content := make([]byte, 16*page)
	rng := rand.New(rand.NewPCG(3, 3))
	for i := range content {
		content[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("open with O_DIRECT: %v; try: TMPDIR on a disk file system", err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

// TestHugetlb: pages of hugetlbfs are armed and reported whole, never broken.
func TestHugetlb(t *testing.T) {
	s, err := memory.New(memory.Config{Size: 4 * frame, HugePages: memory.HugePages2M})
	if err != nil {
		t.Skipf("%v; try: echo 8 > /proc/sys/vm/nr_hugepages", err)
	}
	defer s.Close()
	tr, _, err := memory.OpenTracker(s, memory.TrackerWPAsync, memory.TrackerHost{})
	if errors.Is(err, memory.ErrUnsupported) {
		t.Skipf("%v; try: Linux 6.7 or newer", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	defer tr.Close()
	defer s.SetObserver(nil)
	fill(t, s)
	m, err := trackertest.NewMirror(s, tr)
	if err != nil {
		t.Fatal(err)
	}
	mem, err := s.Writable(0, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	for _, mode := range []memory.CollectMode{memory.Rearm, memory.RearmSmall} {
		mem[frame+5*page]++
		if set, err := m.Round(mode); err != nil || set.Count() != frame/page || set.CountIn(frame, frame) != frame/page {
			t.Errorf("%d pages reported, want one frame (%v)", set.Count(), err)
		}
		if err := m.Check(); err != nil {
			t.Error(err)
		}
		if set, err := m.Round(mode); err != nil || set.Count() != 0 {
			t.Errorf("%d pages reported after re-arming, want none (%v)", set.Count(), err)
		}
	}
	if err := tr.Disarm(memory.Range{Start: frame, Size: frame}); err != nil {
		t.Fatal(err)
	}
	if set, err := m.Round(memory.Rearm); err != nil || set.Count() != frame/page {
		t.Errorf("%d pages reported after disarming, want one frame (%v)", set.Count(), err)
	}
}
