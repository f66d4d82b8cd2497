package api

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// fakeMachine records what it was told.
type fakeMachine struct {
	mu     sync.Mutex
	calls  []string
	state  State
	target uint64
	fail   error
	ended  chan struct{}                   // closed when killed
	slow   func(ctx context.Context) error // delays Memory

	endOnce sync.Once
}

func newFake() *fakeMachine { return &fakeMachine{state: Running, ended: make(chan struct{})} }

func (f *fakeMachine) call(format string, args ...any) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls = append(f.calls, fmt.Sprintf(format, args...))
	return f.fail
}

func (f *fakeMachine) Info() Info {
	f.mu.Lock()
	defer f.mu.Unlock()
	return Info{
		Name: `we"b`, State: f.state, PID: 7, Version: "v", CPUs: 2, MemoryBytes: 1 << 30, Kernel: "/k", CommandLine: "quiet",
		Started: time.Unix(1, 0).UTC(), UptimeMs: 1500, ConsoleLog: "/l", Sandboxed: true,
		Devices: []Device{{Name: "net0", Kind: "virtio-net", MAC: "02:00:00:00:00:01"}},
	}
}

func (f *fakeMachine) Stats() (Stats, error) {
	return Stats{
		UptimeMs: 1500, Exits: map[string]uint64{"mmio": 3, "io": 1 << 60}, Pages2M: 5, ResidentBytes: 9,
		Restore: &RestoreStats{Mode: "lazy", MappedBytes: 5, CopiedBytes: 6, MissingBytes: 7, Faults: 8},
		Tracker: "wp-async", Frames: MemoryFrames{Total: 3, Large: 2, Small: 1, Reasons: map[string]uint64{"balloon": 1}},
		Names:   MemoryNames{Enabled: true, Counters: map[string]uint64{"named": 7, "named_proven": 6, "refuted": 1}},
		Devices: []DeviceStats{{Name: "blk0", Kind: "virtio-blk", Counters: map[string]uint64{"reads": 4, "a\"b\n": 1}}, {Name: "rng0", Kind: "virtio-rng"}},
	}, f.call("stats")
}

func (f *fakeMachine) Memory(ctx context.Context, q MemoryQuery) (Memory, error) {
	mode := q.mode()
	if f.slow != nil {
		if err := f.slow(ctx); err != nil {
			return Memory{}, err
		}
	}
	return Memory{
		Bytes: 1 << 30, Mode: mode, Exact: q.Pause, DurMs: 3, NotPopulatedBytes: 1 << 29, ZeroBytes: 1 << 28, UniqueBytes: 1 << 28,
		Tracker: MemoryTracker{Kind: "none", Sees: "nothing", Misses: "everything"},
	}, f.call("memory %+v", q)
}

func (f *fakeMachine) MemoryMap(_ context.Context, q MemoryQuery) (MemoryMap, error) {
	return MemoryMap{
		Mode: q.mode(), Exact: q.Pause, CellBytes: 4096, Regions: []MemoryRegion{{Bytes: 2 << 20}},
		Classes: []MemoryClass{{Kind: KindZero, Bytes: 8192}}, Pages: make([]byte, 512), Frames: []byte{1},
	}, f.call("map %+v", q)
}

func (f *fakeMachine) Pause(context.Context) error  { return f.call("pause") }
func (f *fakeMachine) Resume(context.Context) error { return f.call("resume") }
func (f *fakeMachine) TakeBack(context.Context) error {
	return f.call("take-back")
}
func (f *fakeMachine) PowerButton() error { return f.call("power-button") }

func (f *fakeMachine) Stop(ctx context.Context, grace time.Duration) error {
	err := f.call("stop %s", grace)
	select {
	case <-f.ended:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (f *fakeMachine) Kill() {
	_ = f.call("kill")
	f.endOnce.Do(func() { close(f.ended) })
}

func (f *fakeMachine) Balloon() (Balloon, error) {
	err := f.call("balloon")
	return Balloon{TargetBytes: f.target, ActualBytes: 1}, err
}

func (f *fakeMachine) ResizeDisk(n int, bytes uint64) error {
	return f.call("resize-disk %d %d", n, bytes)
}

func (f *fakeMachine) SetBalloon(bytes uint64) error {
	f.target = bytes
	return f.call("set-balloon %d", bytes)
}

func (f *fakeMachine) Forwards() []Forward {
	return []Forward{{Protocol: TCP, Listen: "127.0.0.1:80", GuestPort: 8080}}
}

// serve runs a server for m and returns its socket.
func serve(t *testing.T, m Machine) (*Server, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-api-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "api.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(m, slog.New(slog.DiscardHandler))
	s.Serve(l)
	t.Cleanup(func() { _ = s.Close() })
	return s, path
}

func (f *fakeMachine) ConsoleResize(columns, rows uint16) {
	_ = f.call("resize %dx%d", columns, rows)
}
