package vmproc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/terminal"
	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/internal/netd"
	"ditto.vm/migration/live"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/lend/remotesave"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/sandbox"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeMachine ends when it is told to.
type fakeMachine struct {
	cfg      config.Config
	console  io.Writer
	startErr error
	started  chan struct{}
	typed    chan string
	end      chan Exit

	mu     sync.Mutex // guards what follows
	calls  []string
	closed bool
}

func newFake() *fakeMachine {
	return &fakeMachine{started: make(chan struct{}), typed: make(chan string, 10), end: make(chan Exit, 10)}
}

func (m *fakeMachine) call(s string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.calls = append(m.calls, s)
}

func (m *fakeMachine) Start(context.Context) error {
	if m.startErr == nil {
		close(m.started)
	}
	return m.startErr
}

func (m *fakeMachine) Wait(ctx context.Context) (Exit, error) {
	select {
	case e := <-m.end:
		return e, nil
	case <-ctx.Done():
		return Exit{}, ctx.Err()
	}
}

func (m *fakeMachine) WriteInput(_ context.Context, p []byte) { m.typed <- string(p) }

func (m *fakeMachine) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closed = true
	return nil
}

func (m *fakeMachine) Info() api.Info {
	return api.Info{Name: m.cfg.Name, State: api.Running, Started: time.Now()}
}
func (m *fakeMachine) Stats() (api.Stats, error)    { return api.Stats{}, nil }
func (m *fakeMachine) ResizeDisk(int, uint64) error { return nil }
func (m *fakeMachine) Pause(context.Context) error  { return nil }
func (m *fakeMachine) Resume(context.Context) error { return nil }
func (m *fakeMachine) PowerButton() error           { return nil }
func (m *fakeMachine) Stop(ctx context.Context, _ time.Duration) error {
	m.call("stop")
	<-ctx.Done()
	return ctx.Err()
}

func (m *fakeMachine) Kill() {
	m.call("kill")
	m.end <- Exit{Reason: "killed", Code: exit.Killed}
}
func (m *fakeMachine) Memory(context.Context, api.MemoryQuery) (api.Memory, error) {
	return api.Memory{}, api.ErrNotSupported
}
func (m *fakeMachine) MemoryMap(context.Context, api.MemoryQuery) (api.MemoryMap, error) {
	return api.MemoryMap{}, api.ErrNotSupported
}
func (m *fakeMachine) Balloon() (api.Balloon, error) { return api.Balloon{}, api.ErrNotSupported }
func (m *fakeMachine) SetBalloon(uint64) error       { return api.ErrNotSupported }
func (m *fakeMachine) Forwards() []api.Forward       { return nil }
func (m *fakeMachine) ConsoleResize(_, _ uint16)     {}
func (m *fakeMachine) Disks() []registry.Disk {
	return []registry.Disk{{Path: "/disk.img", Format: chain.Raw}}
}
func (m *fakeMachine) Save(context.Context, vmm.SaveHost, vmm.SaveOptions) (vmm.SaveReport, error) {
	return vmm.SaveReport{Rounds: 7}, nil
}
func (m *fakeMachine) TakeBack(context.Context) error { return api.ErrWrongState }
func (m *fakeMachine) Migrate(_ context.Context, _ func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
	m.end <- Exit{Reason: "migrated", Where: o.Where}
	return live.Report{Where: o.Where, Outcome: live.OutcomeCommitted}, nil
}

func newRegistry(t *testing.T) *registry.Registry {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-vmproc-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r, err := registry.OpenAt(filepath.Join(dir, "run"), filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// options are those of a machine m, with a sandbox that does nothing.
func options(t *testing.T, m *fakeMachine) Options {
	cfg := config.Default()
	cfg.Name = "test"
	return Options{
		Config: cfg, Registry: newRegistry(t), Version: "v",
		Log: func(string) (*slog.Logger, error) { return slog.New(slog.DiscardHandler), nil },
		Build: func(_ context.Context, cfg config.Config, s Surroundings) (Machine, error) {
			m.cfg, m.console = cfg, s.Console
			return m, nil
		},
		Sandbox: func(sandbox.Policy) (sandbox.Report, error) { return sandbox.Report{}, nil },
	}
}

// start runs o and returns what Run will.
func start(t *testing.T, o Options) <-chan error {
	t.Helper()
	done := make(chan error, 1)
	go func() {
		code, err := Run(t.Context(), o)
		done <- errors.Join(fmt.Errorf("code %d", code), err)
	}()
	return done
}

// nothingLeft checks that the name and the run directory are free again.
func nothingLeft(t *testing.T, r *registry.Registry) {
	t.Helper()
	entries, err := os.ReadDir(r.RunDir())
	if err != nil || len(entries) != 1 {
		t.Errorf("left behind: %v, %v", entries, err)
	}
}

func TestLife(t *testing.T) {
	m := newFake()
	o := options(t, m)
	var policy sandbox.Policy
	o.Sandbox = func(p sandbox.Policy) (sandbox.Report, error) {
		select {
		case <-m.started:
			t.Error("the guest ran before the sandbox")
		default:
		}
		policy = p
		return sandbox.Report{}, nil
	}
	var out bytes.Buffer
	o.Output = &out
	inRead, inWrite, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer inRead.Close()
	defer inWrite.Close()
	o.Input = inRead
	names := make(chan string, 1)
	o.Ready = func(name string) { names <- name }
	done := start(t, o)
	if name := <-names; name != "test" {
		t.Errorf("ready as %q", name)
	}
	if _, err := m.console.Write([]byte("hello")); err != nil {
		t.Error(err)
	}

	found, err := o.Registry.Find("test")
	if err != nil || found.PID != os.Getpid() || found.CPUs != 1 {
		t.Fatalf("%+v, %v", found, err)
	}
	if policy.RunDir != found.Dir || policy.RunRoot != o.Registry.RunDir() {
		t.Errorf("policy %+v", policy)
	}
	remote, err := api.Dial(found.APISocket())
	if err != nil {
		t.Fatal(err)
	}
	if info, err := remote.Info(t.Context()); err != nil || info.Name != "test" {
		t.Errorf("%+v, %v", info, err)
	}
	remote.Close()
	if diff := cmp.Diff(m.Disks(), found.Disks); diff != "" {
		t.Error(diff)
	}
	if r, err := remotesave.Call(t.Context(), found.OpsSocket(), nil, vmm.SaveOptions{Compression: snapshot.None}); err != nil || r.Rounds != 7 {
		t.Errorf("save: %+v, %v", r, err)
	}
	console, err := net.Dial("unix", found.ConsoleSocket())
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	shown := make([]byte, 5)
	if _, err := io.ReadFull(console, shown); err != nil || string(shown) != "hello" {
		t.Errorf("%q, %v", shown, err)
	}
	if _, err := console.Write([]byte("k")); err != nil || <-m.typed != "k" {
		t.Error("a key was lost", err)
	}
	if _, err := inWrite.WriteString("s"); err != nil || <-m.typed != "s" {
		t.Error("standard input was lost", err)
	}
	if _, err := o.Registry.Acquire("test"); !errors.Is(err, registry.ErrInUse) {
		t.Errorf("the name is free: %v", err)
	}

	m.end <- Exit{Reason: "poweroff"}
	if err := <-done; err.Error() != "code 0" {
		t.Error(err)
	}
	if rest, err := io.ReadAll(console); err != nil || len(rest) != 0 {
		t.Errorf("%q, %v", rest, err)
	}
	if logged, err := os.ReadFile(o.Registry.LogPath("test")); err != nil || string(logged) != "hello" || out.String() != "hello" {
		t.Errorf("log %q, output %q, %v", logged, &out, err)
	}
	if e, err := o.Registry.LastExit("test"); err != nil || e.Reason != "poweroff" || e.Code != 0 {
		t.Errorf("%+v, %v", e, err)
	}
	if !m.closed {
		t.Error("the machine was not closed")
	}
	nothingLeft(t, o.Registry)
}

func TestOutcomes(t *testing.T) {
	const ready, ended = "ditto-init: ready uptime=1\r\n", "ditto-init: exit status=7 seconds=0\r\n"
	for _, test := range []struct {
		name    string
		console string
		command bool
		exit    Exit
		want    string
	}{
		{"panic", "", false, Exit{Reason: "panic", Code: exit.Panicked, Err: errors.New("panicked")}, "code 10\npanicked"},
		{"payload", "", false, Exit{Reason: "status", Code: 3}, "code 3"},
		{"command", ready + "x\r\n" + ended, true, Exit{Reason: "poweroff"}, "code 7"},
		{"command that never ran", "x\r\n", true, Exit{Reason: "poweroff"}, "code 1\nthe guest powered off before the command ended: see ditto logs test"},
		{"command killed", ready + ended, true, Exit{Reason: "killed", Code: exit.Killed}, "code 12"},
	} {
		for _, filtered := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s %t", test.name, filtered), func(t *testing.T) {
				m := newFake()
				o := options(t, m)
				o.Command = test.command
				var out bytes.Buffer
				if filtered && test.command {
					o.Output = terminal.NewCommandOutput(&out, true)
				}
				done := start(t, o)
				<-m.started
				if _, err := m.console.Write([]byte(test.console)); err != nil {
					t.Error(err)
				}
				m.end <- test.exit
				if err := <-done; err.Error() != test.want {
					t.Errorf("%q, want %q", err, test.want)
				}
				if strings.Contains(out.String(), "ditto-init") {
					t.Errorf("%q", &out)
				}
				nothingLeft(t, o.Registry)
			})
		}
	}
}

func TestSignals(t *testing.T) {
	m := newFake()
	o := options(t, m)
	signals := make(chan os.Signal)
	o.Signals = signals
	done := start(t, o)
	signals <- syscall.SIGTERM
	signals <- syscall.SIGTERM
	if err := <-done; err.Error() != "code 12" {
		t.Error(err)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if calls := fmt.Sprint(m.calls); calls != "[stop kill]" && calls != "[kill stop]" {
		t.Error(calls)
	}
}

func TestFailures(t *testing.T) {
	broken := errors.New("broken")
	for _, test := range []struct {
		name   string
		change func(*Options, *fakeMachine)
		code   int
	}{
		{"build", func(o *Options, _ *fakeMachine) {
			o.Build = func(context.Context, config.Config, Surroundings) (Machine, error) { return nil, broken }
		}, exit.Failure},
		{"log", func(o *Options, _ *fakeMachine) {
			o.Log = func(string) (*slog.Logger, error) { return nil, broken }
		}, exit.Failure},
		{"start", func(_ *Options, m *fakeMachine) { m.startErr = broken }, exit.Failure},
		{"sandbox", func(o *Options, _ *fakeMachine) {
			o.Sandbox = func(sandbox.Policy) (sandbox.Report, error) { return sandbox.Report{}, broken }
		}, exit.Sandbox},
	} {
		t.Run(test.name, func(t *testing.T) {
			m := newFake()
			o := options(t, m)
			test.change(&o, m)
			_, err := Run(t.Context(), o)
			if !errors.Is(err, broken) || Classify(err) != test.code {
				t.Errorf("%v, code %d", err, Classify(err))
			}
			nothingLeft(t, o.Registry)
		})
	}
}

func TestClassify(t *testing.T) {
	for _, test := range []struct {
		err  error
		want int
	}{
		{nil, exit.OK},
		{errors.New("x"), exit.Failure},
		{exit.Errorf(77, "x"), 77},
		{&config.Error{}, exit.Usage},
		{&vmm.CPUModelError{}, exit.Usage},
		{&disk.Error{}, exit.Disk},
		{&netd.StartError{}, exit.Net},
		{registry.ErrInUse, exit.NameInUse},
		{registry.ErrNotRunning, exit.NotFound},
		{kvm.ErrNoDevice, exit.NoKVM},
		{kvm.ErrPermission, exit.Permission},
		{vmm.ErrNoLinux, exit.NoLinux},
		{vmm.ErrNoTracker, exit.Tracker},
		{vmm.ErrNoMemory, exit.Memory},
		{boot.ErrNotKernel, exit.Kernel},
		{syscall.ENOMEM, exit.Memory},
	} {
		wrapped := test.err
		if wrapped != nil {
			wrapped = fmt.Errorf("context: %w", test.err)
		}
		if got := Classify(wrapped); got != test.want {
			t.Errorf("%v: %d, want %d", test.err, got, test.want)
		}
	}
}

// HandOver has nothing to hand over.
func (*fakeMachine) HandOver() (*remotemigrate.Belongings, error) {
	return &remotemigrate.Belongings{}, nil
}
