package trackertest_test

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

var kinds = []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing, memory.TrackerNone}

// TestVCPUWrites follows a machine whose vCPU writes at full speed, while the
// VMM writes, discards and reads files past the page cache into the same large
// frames.
func TestVCPUWrites(t *testing.T) {
	for _, kind := range kinds {
		for _, huge := range []memory.HugePages{memory.HugePagesTHP, memory.HugePagesOff} {
			for _, order := range []payload.Order{payload.Sequential, payload.Random} {
				t.Run(fmt.Sprintf("%s/%s/%s", kind, huge, order), func(t *testing.T) {
					followGuest(t, kind, huge, order)
				})
			}
		}
	}
}

func followGuest(t *testing.T, kind memory.TrackerKind, huge memory.HugePages, order payload.Order) {
	const size, rounds = 40 << 20, 20
	m := newMachine(t, memory.Config{Size: size, HugePages: huge}, kind)
	// The working set ends inside a large frame: the VMM's part shares it.
	m.load(payload.MemWriterConfig{WorkingSet: size - guestStart - reserved - 5*page, Order: order, Words: 3, Seed: 7})
	mirror, err := trackertest.NewMirror(m.mem, m.tracker)
	if err != nil {
		t.Fatal(err)
	}
	m.start()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	direct := directFile(t)
	wg.Go(func() { vmmWrites(t, m.mem, direct, stop) })
	last := uint64(0)
	for n := range rounds {
		mode := memory.Rearm
		if n%3 == 2 {
			mode = memory.RearmSmall
		}
		if _, err := mirror.Round(mode); err != nil {
			t.Error(err)
			break
		}
		// Each round has writes of the guest in it.
		s := m.await(func(s payload.MemWriterStatus) bool { return s.Writes >= last+500 })
		last = s.Writes
	}
	close(stop)
	wg.Wait()
	m.command(payload.CommandPause, payload.StatePaused)
	if _, err := mirror.Round(memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if err := mirror.Check(); err != nil {
		t.Error(err)
	}
	// What is paused writes nothing.
	if set, err := mirror.Round(memory.Rearm); kind != memory.TrackerNone && (err != nil || set.Count() > 1) {
		t.Errorf("%d pages written while paused, want at most the status page (%v)", set.Count(), err)
	}
	m.finish()
}

// vmmWrites does what devices do, to the reserved top of RAM.
func vmmWrites(t *testing.T, s *memory.Space, direct int, stop <-chan struct{}) {
	rng := rand.New(rand.NewPCG(9, 9))
	for i := 0; ; i++ {
		select {
		case <-stop:
			return
		default:
		}
		gpa := memory.GPA(s.Size() - (1+rng.Uint64N(reserved/page))*page)
		var err error
		switch i % 3 {
		case 0:
			err = s.WriteAt([]byte(fmt.Sprint(i)), gpa+memory.GPA(rng.IntN(page-20)))
		case 1:
			err = s.Discard(gpa, page)
		case 2:
			err = readDirect(s, direct, gpa, int64(rng.IntN(16))*page)
		}
		if err != nil {
			t.Error(err)
			return
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
func directFile(t testing.TB) int {
	t.Helper()
	path := filepath.Join(t.TempDir(), "direct")
	content := make([]byte, 16*page)
	_, _ = rand.NewChaCha8([32]byte{3}).Read(content)
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

// TestFramesUnderGuest breaks and collapses 1,000 random frames under a running
// guest, which checks its memory at the end, and compares ditto's book with smaps
// and with KVM.
func TestFramesUnderGuest(t *testing.T) {
	const size = 128 << 20
	m := newMachine(t, memory.Config{Size: size}, memory.TrackerWPAsync)
	m.load(payload.MemWriterConfig{WorkingSet: size - guestStart, Order: payload.Random, Words: 2, Seed: 3})
	frames, err := memory.NewFrames(m.mem, m.tracker)
	if err != nil {
		t.Fatal(err)
	}
	defer frames.Close()
	m.start()
	m.await(func(s payload.MemWriterStatus) bool { return s.Writes > 40*(size-guestStart)/page/10 })

	rng := rand.New(rand.NewPCG(8, 8))
	busy := 0
	for range 1000 {
		gpa := guestStart + memory.GPA(rng.IntN((size-guestStart)/frame))*frame
		r := memory.Range{Start: gpa, Size: frame}
		var err error
		switch rng.IntN(4) {
		case 0:
			err = frames.Break(gpa, memory.ReasonShared)
		case 1:
			err = m.tracker.Arm(r)
		default:
			frames.Settle(r, memory.ReasonShared)
			err = frames.Collapse(gpa, 512)
		}
		switch {
		case errors.Is(err, memory.ErrFrameBusy):
			busy++
		case err != nil:
			t.Error(err)
		}
	}
	t.Logf("%d of 1000 operations met a busy frame", busy)
	// Everything large again: all three books must say so.
	for i := range memory.GPA((size - guestStart) / frame) {
		gpa := guestStart + i*frame
		frames.Settle(memory.Range{Start: gpa, Size: frame}, memory.ReasonShared)
		err := memory.ErrFrameBusy
		for try := 0; errors.Is(err, memory.ErrFrameBusy) && try < 100; try++ {
			err = frames.Collapse(gpa, 512)
		}
		if err != nil {
			t.Error(err)
		}
	}
	m.command(payload.CommandCheck, payload.StatePaused) // touches every page
	if err := frames.Refresh(m.mem.Regions()[0].Range); err != nil {
		t.Fatal(err)
	}
	usage, err := m.mem.HostUsage()
	if err != nil {
		t.Fatal(err)
	}
	c := frames.Census()
	if uint64(c.Large())*frame != usage.AnonHugePages {
		t.Errorf("the book says %d large frames, smaps %d", c.Large(), usage.AnonHugePages/frame)
	}
	// KVM maps what the guest has touched since the last change, and no more
	// with 2 MiB entries than the host has huge pages.
	inKVM := m.largeInKVM()
	t.Logf("census %+v, smaps %d, KVM %d", c, usage.AnonHugePages/frame, inKVM)
	if working := uint64((size - guestStart) / frame); inKVM > uint64(c.Large()) || inKVM < working*95/100 {
		t.Errorf("KVM maps %d frames large, the book says %d of %d", inKVM, c.Large(), c.Frames)
	}
	m.finish()
}
