package vmm

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// requireKVM skips without a usable /dev/kvm, or fails when there must be one.
func requireKVM(t testing.TB) {
	t.Helper()
	s, err := kvm.Open()
	if err == nil {
		_ = s.Close()
		return
	}
	if os.Getenv(labtest.EnvRequireKVM) != "" {
		t.Fatal(err)
	}
	t.Skipf("%v; try: run as a member of the kvm group on a machine with KVM", err)
}

// consoleLog collects what a guest prints.
type consoleLog struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{} // signalled at every write
}

func newConsole() *consoleLog { return &consoleLog{more: make(chan struct{}, 1)} }

func (c *consoleLog) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case c.more <- struct{}{}:
	default:
	}
	return c.text.Write(p)
}

func (c *consoleLog) String() string {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.text.String()
}

// payloadConfig is a small machine without devices that boots a payload.
func payloadConfig(spec string) config.Config {
	c := config.Default()
	c.Name = "test"
	c.Memory.Size = 16 << 20
	c.Kernel = PayloadPrefix + spec
	c.Nets, c.RNG, c.Balloon.Enabled = nil, false, false
	return c
}

// newVM makes a VM that the test closes.
func newVM(t testing.TB, c config.Config, out *consoleLog) *VM {
	t.Helper()
	requireKVM(t)
	m, err := New(t.Context(), c, Options{Console: out, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
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

// deadline bounds one guest of a test.
func deadline(t testing.TB) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func TestPayloadRunsToItsEnd(t *testing.T) {
	out := newConsole()
	m := newVM(t, payloadConfig("hello"), out)
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if exit.Reason != ExitStatus || exit.Status != 0 {
		t.Errorf("exit %+v, want status 0", exit)
	}
	if got := out.String(); !strings.Contains(got, "hello") {
		t.Errorf("console %q, want a greeting", got)
	}
	stats, err := m.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if stats.Exits["io"] == 0 {
		t.Errorf("exits %v, want some by I/O", stats.Exits)
	}
}

func TestPauseStopsTheGuest(t *testing.T) {
	m := newVM(t, payloadConfig("spin"), newConsole())
	ctx := deadline(t)
	if err := m.Pause(ctx); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("pause before the start: %v, want api.ErrWrongState", err)
	}
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := m.Pause(ctx); err != nil {
			t.Fatal(err)
		}
		before := instructionPointer(t, m)
		runtime.Gosched()
		if after := instructionPointer(t, m); after != before {
			t.Fatalf("a paused vCPU moved from %#x to %#x", before, after)
		}
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	m.Kill()
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitKilled {
		t.Errorf("exit %+v, %v, want killed", exit, err)
	}
	if err := m.Resume(ctx); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("resume after the end: %v, want api.ErrWrongState", err)
	}
}

func instructionPointer(t *testing.T, m *VM) uint64 {
	t.Helper()
	var rip uint64
	err := m.vcpus[0].do(t.Context(), func() error {
		r, err := m.vcpus[0].kvm.Regs()
		rip = r.RIP + r.RAX + r.RCX
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return rip
}

func TestStopKillsWhatDoesNotListen(t *testing.T) {
	m := newVM(t, payloadConfig("spin"), newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	if err := m.Stop(ctx, 10*time.Millisecond); err != nil {
		t.Fatal(err)
	}
	if exit, err := m.Wait(ctx); err != nil || exit.Reason != ExitKilled {
		t.Errorf("exit %+v, %v, want a kill", exit, err)
	}
}

// fullConfig is a machine with everything that a payload can have around it.
func fullConfig(t testing.TB, spec string) config.Config {
	t.Helper()
	c := payloadConfig(spec)
	image := filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Disks = []config.Disk{{Path: image}}
	c.RNG, c.Balloon.Enabled = true, true
	return c
}

// TestBootsLeaveNothing: descriptors, goroutines and memory are as before after
// many guests.
func TestBootsLeaveNothing(t *testing.T) {
	requireKVM(t)
	boots := labtest.Count(20, 200)
	c := fullConfig(t, "hello")
	boot := func() {
		out := newConsole()
		m, err := New(t.Context(), c, Options{Console: out})
		if err != nil {
			t.Fatal(err)
		}
		ctx := deadline(t)
		if err := m.Start(ctx); err != nil {
			t.Fatal(err)
		}
		if exit, err := m.Wait(ctx); err != nil || exit.Reason != ExitStatus {
			t.Fatalf("exit %+v, %v", exit, err)
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
	boot() // whatever the runtime keeps for good
	fds, goroutines, mapped := countFDs(t), runtime.NumGoroutine(), mappings(t)
	for range boots {
		boot()
	}
	if got := countFDs(t); got != fds {
		t.Errorf("%d descriptors after %d boots, %d before", got, boots, fds)
	}
	if got := runtime.NumGoroutine(); got != goroutines {
		t.Errorf("%d goroutines after %d boots, %d before", got, boots, goroutines)
	}
	// A leaked guest would show as two mappings or more a boot; the runtime's
	// own arenas and thread stacks add a few in all.
	if got := mappings(t); got >= mapped+boots {
		t.Errorf("%d mappings after %d boots, %d before", got, boots, mapped)
	}
	labtest.Proof(t, "boots-native", "%d boots, %d descriptors before and %d after, %d and %d goroutines", boots, fds, countFDs(t), goroutines, runtime.NumGoroutine())
}

func countFDs(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func mappings(t *testing.T) int {
	t.Helper()
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		t.Fatal(err)
	}
	return bytes.Count(maps, []byte{'\n'})
}

// TestNewFailures: a machine that cannot be made says why and leaves nothing.
func TestNewFailures(t *testing.T) {
	requireKVM(t)
	for _, tt := range []struct {
		name   string
		change func(*config.Config)
		want   string
	}{
		{"no kernel", func(c *config.Config) { c.Kernel = "/nonexistent/vmlinuz" }, "/nonexistent/vmlinuz"},
		{"no such payload", func(c *config.Config) { c.Kernel = PayloadPrefix + "no-such" }, "no-such"},
		{"too many CPUs", func(c *config.Config) { c.CPUs = 100000 }, "vCPUs"},
		{"no such tracker", func(c *config.Config) {
			c.Memory.Backing, c.Memory.Tracker = memory.Memfd, memory.TrackerWPAsync
		}, "wp-async"},
		{"no disk behind the tracker", func(c *config.Config) {
			c.Memory.Tracker, c.Disks = memory.TrackerKVMRing, []config.Disk{{Path: "/nonexistent/disk.img"}}
		}, "disk.img"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := payloadConfig("hello")
			tt.change(&c)
			fds := countFDs(t)
			m, err := New(t.Context(), c, Options{Console: newConsole()})
			if err == nil {
				_ = m.Close()
				t.Fatal("no error")
			}
			if !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error %q does not name %q", err, tt.want)
			}
			if got := countFDs(t); got != fds {
				t.Errorf("%d descriptors after the failure, %d before", got, fds)
			}
		})
	}
}

// TestResetsAreOne: a kernel that pulses the reset line again and again until
// it is stopped is restarted once.
func TestResetsAreOne(t *testing.T) {
	m := &VM{requests: make(chan request, 1), ended: make(chan struct{})}
	m.request(requestReset)
	<-m.requests // the supervisor is at work
	for range 9 {
		m.request(requestReset)
	}
	if n := len(m.requests); n != 0 {
		t.Errorf("%d resets more are queued", n)
	}
	m.resetDue.Store(false) // the vCPUs are stopped
	m.request(requestReset)
	if n := len(m.requests); n != 1 {
		t.Errorf("%d resets of the restarted guest are queued, want 1", n)
	}
}
