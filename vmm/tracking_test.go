package vmm

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// trackers are those that a machine can be asked for.
var trackers = []memory.TrackerKind{memory.TrackerAuto, memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing, memory.TrackerNone}

// TestTrackers: with each tracker a guest that writes while its memory is armed
// and collected again and again finds its memory intact, and is seen to write.
func TestTrackers(t *testing.T) {
	for _, kind := range trackers {
		t.Run(kind.String(), func(t *testing.T) {
			// More pages than a dirty ring has entries.
			c := payloadConfig("memwriter:size=80M,words=2,limit=100000,seed=7")
			c.Memory.Size = 96 << 20
			c.Memory.Tracker = kind
			m := newVM(t, c, newConsole())
			if got := m.tracker.Kind(); kind != memory.TrackerAuto && got != kind {
				t.Fatalf("the tracker is %s", got)
			}
			ctx := deadline(t)
			all, seen := m.mem.Regions()[0].Range, m.mem.NewPageSet()
			if err := m.tracker.Arm(all); err != nil {
				t.Fatal(err)
			}
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() {
				exit, err := m.Wait(ctx)
				if err == nil && (exit.Reason != ExitStatus || exit.Status != 0) {
					err = errors.New(string(exit.Reason))
				}
				ended <- err
			}()
			for running := true; running; {
				select {
				case err := <-ended:
					if err != nil {
						t.Error(err)
					}
					running = false
				case <-time.After(5 * time.Millisecond):
					if kind == memory.TrackerKVMRing {
						continue // left alone, it fills up
					}
					if err := m.tracker.Collect(all, seen, memory.Rearm); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := m.tracker.Collect(all, seen, memory.Rearm); err != nil {
				t.Fatal(err)
			}
			if n := seen.CountIn(4<<20, 80<<20); n < 80<<20/memory.PageSize {
				t.Errorf("%d pages were seen to be written", n)
			}
			stats, err := m.Stats()
			if err != nil {
				t.Fatal(err)
			}
			if kind == memory.TrackerKVMRing && stats.Exits["dirty-ring-full"] == 0 {
				t.Errorf("exits %v: no ring was full", stats.Exits)
			}
		})
	}
}

// TestTrackerIsRefused: memory that a tracker cannot follow is an error that
// says what to do, and auto takes another tracker and says so once.
func TestTrackerIsRefused(t *testing.T) {
	requireKVM(t)
	c := payloadConfig("hello")
	c.Memory.Backing, c.Memory.Tracker = memory.Memfd, memory.TrackerWPAsync
	fds := countFDs(t)
	_, err := New(t.Context(), c, Options{Console: newConsole()})
	if !errors.Is(err, ErrNoTracker) || !errors.Is(err, memory.ErrUnsupported) || strings.Contains(err.Error(), "\n") {
		t.Errorf("error %v, want one line that is ErrNoTracker", err)
	}
	if got := countFDs(t); got != fds {
		t.Errorf("%d descriptors after the failure, %d before", got, fds)
	}

	var log bytes.Buffer
	c.Memory.Tracker = memory.TrackerAuto
	m, err := New(t.Context(), c, Options{Console: newConsole(), Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.tracker.Kind() == memory.TrackerWPAsync {
		t.Error("shared memory is tracked by wp-async")
	}
	if n := strings.Count(log.String(), "slower way"); n != 1 {
		t.Errorf("the slower tracker is announced %d times:\n%s", n, &log)
	}
}

// await polls until ok, which must come.
func await(t *testing.T, ctx context.Context, what string, ok func() bool) {
	t.Helper()
	for !ok() {
		if ctx.Err() != nil {
			t.Fatalf("%s: %v", what, ctx.Err())
		}
		time.Sleep(time.Millisecond)
	}
}

// frameState refreshes and returns how a frame is mapped.
func frameState(t *testing.T, m *VM, gpa memory.GPA) memory.FrameState {
	t.Helper()
	if err := m.frames.Refresh(memory.Range{Start: gpa, Size: memory.LargeFrameSize}); err != nil {
		t.Fatal(err)
	}
	state, _, _ := m.frames.At(gpa)
	return state
}

// requireFrames makes a machine whose frames can be made large, running, with a
// frame of data at gpa.
func requireFrames(t *testing.T, c config.Config, gpa memory.GPA) *VM {
	t.Helper()
	m := newVM(t, c, newConsole())
	if m.keeper == nil {
		t.Skip("frames cannot be made large here: Linux 6.7 or newer with transparent huge pages is needed")
	}
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	if err := m.mem.WriteAt(bytes.Repeat([]byte{0xa5}, memory.LargeFrameSize), gpa); err != nil {
		t.Fatal(err)
	}
	if frameState(t, m, gpa) != memory.FrameLarge {
		t.Skip("the host has no free huge page")
	}
	return m
}

// TestFramesAreKeptLarge: a frame whose reason is gone becomes large again while
// the guest runs, and nothing happens to a paused guest's frames.
func TestFramesAreKeptLarge(t *testing.T) {
	const gpa = 8 << 20
	m := requireFrames(t, payloadConfig("spin"), gpa)
	ctx := deadline(t)
	for range 3 {
		if err := m.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		if m.background.cancel != nil {
			t.Fatal("work goes on beside a paused guest")
		}
		if err := m.frames.Break(gpa, memory.ReasonShared); err != nil {
			t.Fatal(err)
		}
		m.frames.Settle(memory.Range{Start: gpa, Size: memory.LargeFrameSize}, memory.ReasonShared)
		if got := frameState(t, m, gpa); got != memory.FrameSmall {
			t.Fatalf("the broken frame is %s", got)
		}
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		await(t, ctx, "the frame becomes large", func() bool { return frameState(t, m, gpa) == memory.FrameLarge })
	}
}

// TestRestartKeepsTracking: a restart empties memory under the tracker and the
// keeper, which then go on.
func TestRestartKeepsTracking(t *testing.T) {
	const gpa = 8 << 20
	m := requireFrames(t, payloadConfig("spin"), gpa)
	ctx := deadline(t)
	for i := range 3 {
		m.request(requestReset)
		await(t, ctx, "restart", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.resets > i })
		if got := frameState(t, m, gpa); got != memory.FrameEmpty {
			t.Errorf("a frame is %s after the restart", got)
		}
		m.mu.Lock()
		works, state := m.background.cancel != nil, m.state
		m.mu.Unlock()
		if !works || state != api.Running {
			t.Errorf("the machine is %s, work beside it: %t", state, works)
		}
	}
}

// TestBallooned: a frame stays small until the last of its pages has left the
// balloon.
func TestBallooned(t *testing.T) {
	space, err := memory.New(memory.Config{Size: 8 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	tracker, _, err := memory.OpenTracker(space, memory.TrackerNone, memory.TrackerHost{})
	if err != nil {
		t.Fatal(err)
	}
	frames, err := memory.NewFrames(space, tracker)
	if err != nil {
		t.Skipf("%v: Linux 6.7 or newer is needed", err)
	}
	defer frames.Close()
	const page, frame = memory.PageSize, memory.LargeFrameSize
	held := func() (list []bool) {
		for gpa := memory.GPA(0); gpa < 8<<20; gpa += frame {
			_, why, _ := frames.At(gpa)
			list = append(list, why&memory.ReasonBalloon != 0)
		}
		return list
	}
	b := &ballooned{space: space, frames: frames}
	for _, step := range []struct {
		name string
		do   func(memory.Range)
		r    memory.Range
		want [4]bool
	}{
		{"release nothing", b.Release, memory.Range{Start: 0, Size: page}, [4]bool{}},
		{"two pages", b.Hold, memory.Range{Start: 5 * page, Size: 2 * page}, [4]bool{true}},
		{"across frames", b.Hold, memory.Range{Start: 2*frame - page, Size: 2 * page}, [4]bool{true, true, true}},
		{"the same again", b.Hold, memory.Range{Start: 5 * page, Size: page}, [4]bool{true, true, true}},
		{"outside RAM", b.Hold, memory.Range{Start: 1 << 40, Size: page}, [4]bool{true, true, true}},
		{"one of two", b.Release, memory.Range{Start: 5 * page, Size: page}, [4]bool{true, true, true}},
		{"one that is not in it", b.Release, memory.Range{Start: 9 * page, Size: page}, [4]bool{true, true, true}},
		{"both", b.Release, memory.Range{Start: 6 * page, Size: page}, [4]bool{false, true, true}},
		{"across the border", b.Release, memory.Range{Start: 2*frame - page, Size: page}, [4]bool{false, false, true}},
		{"reset", func(memory.Range) { b.ReleaseAll() }, memory.Range{}, [4]bool{}},
		{"after the reset", b.Hold, memory.Range{Start: 3 * frame, Size: page}, [4]bool{3: true}},
	} {
		step.do(step.r)
		if got := [4]bool(held()); got != step.want {
			t.Errorf("%s: frames held %v, want %v", step.name, got, step.want)
		}
		// A restore holds the same.
		saved := b.saved()
		b.ReleaseAll()
		if err := b.restore(saved); err != nil {
			t.Fatal(err)
		}
		if got := [4]bool(held()); got != step.want || !slices.Equal(b.saved(), saved) {
			t.Errorf("%s: after a restore frames held %v, want %v; pages %v, want %v", step.name, got, step.want, b.saved(), saved)
		}
	}
	for _, bad := range [][]uint64{{1}, {0, 0}, {1 << 63, 1}, {1, 1 << 63}, {1, 1, math.MaxUint64, 1}} {
		if err := b.restore(bad); err == nil {
			t.Errorf("%v is restored", bad)
		}
	}
}

func TestLargePagesMissing(t *testing.T) {
	for _, c := range []struct {
		global, own string
		want        string // a part of the cure
	}{
		{"always [madvise] never", "always [inherit] madvise never", ""},
		{"[always] madvise never", "", ""},
		{"always madvise [never]", "", "echo madvise >"},
		{"always madvise [never]", "always [inherit] madvise never", "echo madvise >"},
		{"always madvise [never]", "[always] inherit madvise never", ""},
		{"[always] madvise never", "always inherit madvise [never]", "echo inherit >"},
		{"", "", "CONFIG_TRANSPARENT_HUGEPAGE"},
	} {
		root := t.TempDir()
		dir := filepath.Join(root, "sys/kernel/mm/transparent_hugepage")
		for path, text := range map[string]string{"enabled": c.global, "hugepages-2048kB/enabled": c.own} {
			if text == "" {
				continue
			}
			path = filepath.Join(dir, path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(text+"\n"), 0o600)); err != nil {
				t.Fatal(err)
			}
		}
		if why, cure := LargePagesMissing(root); !strings.Contains(cure, c.want) || (cure == "") != (c.want == "") || (why == "") != (c.want == "") {
			t.Errorf("enabled %q, of 2 MiB %q: %q, %q, want %q", c.global, c.own, why, cure, c.want)
		}
	}
}
