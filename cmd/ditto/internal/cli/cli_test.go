package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
	"ditto.vm/vmm"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/registry"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeMachine is a guest that says hello, echoes what is typed, and ends when
// it is stopped or killed.
type fakeMachine struct {
	cfg     config.Config
	console io.Writer
	end     chan vmproc.Exit
	started time.Time

	save fakeSave
	move fakeMove

	mu      sync.Mutex // guards what follows
	state   api.State
	balloon uint64
	disk    uint64 // its size
	doubt   *api.Migration
}

// fakeSave is how a fake machine is saved.
type fakeSave func(context.Context, *fakeMachine, vmm.SaveHost, vmm.SaveOptions) (vmm.SaveReport, error)

func (m *fakeMachine) Save(ctx context.Context, host vmm.SaveHost, o vmm.SaveOptions) (vmm.SaveReport, error) {
	return m.save(ctx, m, host, o)
}

// fakeMove is how a fake machine moves.
type fakeMove func(context.Context, *fakeMachine, func(context.Context, bool) (net.Conn, error), live.Options) (live.Report, error)

func (m *fakeMachine) Migrate(ctx context.Context, dial func(context.Context, bool) (net.Conn, error), o live.Options) (live.Report, error) {
	return m.move(ctx, m, dial, o)
}

func (m *fakeMachine) TakeBack(context.Context) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.doubt == nil {
		return fmt.Errorf("nothing is in doubt: %w", api.ErrWrongState)
	}
	m.doubt, m.state = nil, api.Running
	return nil
}

func (m *fakeMachine) Start(context.Context) error {
	m.started = time.Now()
	_, err := m.console.Write([]byte("hello from " + m.cfg.Name + "\r\n"))
	return err
}

func (m *fakeMachine) Wait(ctx context.Context) (vmproc.Exit, error) {
	select {
	case e := <-m.end:
		return e, nil
	case <-ctx.Done():
		return vmproc.Exit{}, ctx.Err()
	}
}
func (m *fakeMachine) WriteInput(_ context.Context, p []byte) { _, _ = m.console.Write(p) }
func (m *fakeMachine) Close() error                           { return nil }

func (m *fakeMachine) Info() api.Info {
	m.mu.Lock()
	defer m.mu.Unlock()
	return api.Info{Name: m.cfg.Name, State: m.state, CPUs: m.cfg.CPUs, MemoryBytes: uint64(m.cfg.Memory.Size), Started: m.started, UptimeMs: 61_500, Migration: m.doubt}
}

func (m *fakeMachine) Stats() (api.Stats, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	size := max(m.disk, 1<<20)
	return api.Stats{
		UptimeMs: 1000, Exits: map[string]uint64{"io": 5}, Pages2M: 1, Pages4K: 512, ResidentBytes: 3 << 20,
		Restore: &api.RestoreStats{Mode: "lazy", MappedBytes: 2 << 20, CopiedBytes: 4096, MissingBytes: 8192, Faults: 3},
		Tracker: "wp-async", Frames: api.MemoryFrames{Total: 4, Large: 3, Small: 1, Reasons: map[string]uint64{"tracking": 1, "balloon": 0}},
		Names:   api.MemoryNames{Enabled: true, Counters: map[string]uint64{"named": 7, "named_proven": 5, "refuted": 1}},
		Devices: []api.DeviceStats{{Name: "blk0", Counters: map[string]uint64{"read_bytes": 4096, "size_bytes": size}}},
	}, nil
}

func (m *fakeMachine) set(s api.State) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.state = s
	return nil
}
func (m *fakeMachine) Pause(context.Context) error  { return m.set(api.Paused) }
func (m *fakeMachine) Resume(context.Context) error { return m.set(api.Running) }
func (m *fakeMachine) PowerButton() error           { return nil }
func (m *fakeMachine) Stop(_ context.Context, grace time.Duration) error {
	if grace == 0 {
		m.Kill()
		return nil
	}
	m.end <- vmproc.Exit{Reason: "poweroff"}
	return nil
}
func (m *fakeMachine) Kill() { m.end <- vmproc.Exit{Reason: "killed", Code: exit.Killed} }
func (m *fakeMachine) Balloon() (api.Balloon, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return api.Balloon{TargetBytes: m.balloon, Guest: map[string]uint64{"free_bytes": 8192}}, nil
}
func (m *fakeMachine) ResizeDisk(n int, bytes uint64) error {
	if n != 0 {
		return fmt.Errorf("no disk %d: %w", n, api.ErrNotSupported)
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.disk = bytes
	return nil
}
func (m *fakeMachine) SetBalloon(bytes uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.balloon = bytes
	return nil
}
func (m *fakeMachine) Forwards() []api.Forward { return nil }
func (m *fakeMachine) Disks() (disks []registry.Disk) {
	for _, d := range m.cfg.Disks {
		disks = append(disks, registry.Disk{Path: d.Path, Format: d.Format, ReadOnly: d.ReadOnly})
	}
	return disks
}
func (m *fakeMachine) ConsoleResize(_, _ uint16) {}

// HandOver has no memory to hand over.
func (m *fakeMachine) HandOver() (*remotemigrate.Belongings, error) {
	return &remotemigrate.Belongings{}, nil
}

// host is a place to run commands in.
type host struct {
	t        *testing.T
	registry *registry.Registry
	null     *os.File
	save     fakeSave
	move     fakeMove
	failure  atomic.Pointer[error] // of failing
	restored chan vmproc.Restore   // hears of machines that are restored
}

func newHost(t *testing.T) *host {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-cli-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	r, err := registry.OpenAt(filepath.Join(dir, "run"), filepath.Join(dir, "state"))
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = null.Close() })
	return &host{t: t, registry: r, null: null, restored: make(chan vmproc.Restore, 10)}
}

// env returns an environment that writes to out and errs.
func (h *host) env(out, errs io.Writer) *Env {
	build := func(_ context.Context, cfg config.Config, s vmproc.Surroundings) (vmproc.Machine, error) {
		if cfg.Kernel == "payload:broken" {
			return nil, errors.New("broken\nin two lines")
		}
		return &fakeMachine{cfg: cfg, console: s.Console, end: make(chan vmproc.Exit, 10), state: api.Running, save: h.save, move: h.move}, nil
	}
	return &Env{
		Stdin: h.null, Stdout: out, Stderr: errs,
		Registry: func() (*registry.Registry, error) { return h.registry, nil },
		Build:    build,
		Restore: func(r vmproc.Restore) vmproc.Builder {
			h.restored <- r
			return build
		},
		Version: Version{Version: "v1.2.3", Commit: "0123456789abcdef", Go: "go1", Platform: "p"},
	}
}

// do runs a command line to its end.
func (h *host) do(args ...string) (code int, out, errs string) {
	h.t.Helper()
	var o, e bytes.Buffer
	code = h.env(&o, &e).Execute(h.t.Context(), args)
	return code, o.String(), e.String()
}

// want runs a command line that must work.
func (h *host) want(args ...string) string {
	h.t.Helper()
	code, out, errs := h.do(args...)
	if code != 0 || errs != "" {
		h.t.Errorf("ditto %s: code %d: %s", strings.Join(args, " "), code, errs)
	}
	return out
}

// start runs a machine in the background and waits until it is known. The
// result comes when it has ended.
func (h *host) start(name string, flags ...string) <-chan int {
	h.t.Helper()
	return h.background(append([]string{"run", "--kernel", "payload:x", "--sandbox=off", "--name", name}, flags...)...)
}

// background runs a command line that runs a machine.
func (h *host) background(args ...string) <-chan int {
	h.t.Helper()
	done := make(chan int, 1)
	shown, console := io.Pipe()
	go func() {
		done <- h.env(console, io.Discard).Execute(h.t.Context(), args)
		_ = console.Close()
	}()
	if _, err := io.ReadFull(shown, make([]byte, len("hello"))); err != nil {
		h.t.Fatal(err)
	}
	go func() { _, _ = io.Copy(io.Discard, shown) }()
	return done
}

func TestMachines(t *testing.T) {
	h := newHost(t)
	if out := h.want("ps"); out != "NAME  STATE  PID  CPUS  MEMORY  UPTIME  KERNEL\n" {
		t.Errorf("%q", out)
	}
	a, b := h.start("a"), h.start("b")
	if out := h.want("ps", "-q"); out != "a\nb\n" {
		t.Errorf("%q", out)
	}
	out := h.want("ps")
	if !strings.Contains(out, "running") || !strings.Contains(out, "512MiB") || !strings.Contains(out, "1m1s") {
		t.Error(out)
	}
	h.want("pause", "a")
	var rows []psRow
	if err := json.Unmarshal([]byte(h.want("ps", "--json")), &rows); err != nil || len(rows) != 2 || rows[0].State != "paused" || rows[1].State != "running" {
		t.Errorf("%+v, %v", rows, err)
	}
	h.want("resume", "a")
	out = h.want("stats", "a")
	for _, want := range []string{
		"exits io", "blk0 read_bytes", "4KiB", "50.0 % with large entries",
		"wp-async", "3 large, 1 small, 0 empty of 4", "small frames tracking", "lazy: 2MiB mapped, 4KiB copied, 8KiB still missing, 3 faults", "7 pages, 5 of them proven", "names refuted",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if strings.Contains(out, "balloon") {
		t.Errorf("a reason that no frame has is shown:\n%s", out)
	}
	if out := h.want("stats", "a", "--prometheus"); !strings.Contains(out, `ditto_vm_exits_total{vm="a",reason="io"} 5`) {
		t.Error(out)
	}
	h.want("disk", "resize", "a", "0", "2M")
	h.want("disk", "resize", "a", "blk0", "1536K", "--shrink")
	if out := h.want("stats", "a"); !strings.Contains(out, "1536KiB") {
		t.Errorf("no disk of 1536 KiB in\n%s", out)
	}
	h.want("balloon", "a", "64M")
	if out := h.want("balloon", "a"); !strings.Contains(out, "64MiB") || !strings.Contains(out, "guest free_bytes") {
		t.Error(out)
	}
	if out := h.want("logs", "a"); out != "hello from a\r\n" {
		t.Errorf("%q", out)
	}
	if code, _, errs := h.do("run", "--kernel", "payload:x", "--name", "a", "--sandbox=off"); code != exit.NameInUse || !strings.Contains(errs, "a") {
		t.Errorf("code %d: %s", code, errs)
	}
	h.want("stop", "a")
	if code := <-a; code != exit.OK {
		t.Errorf("stopped machine: code %d", code)
	}
	h.want("kill", "b")
	if code := <-b; code != exit.Killed {
		t.Errorf("killed machine: code %d", code)
	}
	if out := h.want("logs", "a"); out != "hello from a\r\n" {
		t.Errorf("after the end: %q", out)
	}
	c := h.start("c")
	if code, _, errs := h.do("stop", "--grace", "0s", "c"); code != exit.Killed || !strings.Contains(errs, "was killed") {
		t.Errorf("code %d: %s", code, errs)
	}
	<-c
}

// TestErrors checks the code and the one line of mistakes.
func TestErrors(t *testing.T) {
	h := newHost(t)
	defer func() { h.want("kill", "here") }()
	h.start("here")
	for _, test := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"frobnicate"}, exit.Usage, "unknown command"},
		{[]string{"ps", "--nope"}, exit.Usage, "unknown flag: --nope: see ditto ps --help"},
		{[]string{"stop"}, exit.Usage, "requires at least 1 arg"},
		{[]string{"stats", "a", "b"}, exit.Usage, "accepts 1 arg"},
		{[]string{"stop", "gone"}, exit.NotFound, `no machine "gone" is running (running: here)`},
		{[]string{"kill", "../x"}, exit.NotFound, `no machine "../x"`},
		{[]string{"logs", "gone"}, exit.NotFound, "has a log"},
		{[]string{"console", "gone"}, exit.NotFound, "running: here"},
		{[]string{"balloon", "here", "lots"}, exit.Usage, "is not a size"},
		{[]string{"balloon", "here", "1T"}, exit.Failure, "leave the guest some"},
		{[]string{"disk", "resize", "here", "0", "lots"}, exit.Usage, "is not a size"},
		{[]string{"disk", "resize", "here", "sda", "2M"}, exit.Usage, `"sda" is no disk: use 0 or blk0`},
		{[]string{"disk", "resize", "here", "0", "4K"}, exit.Usage, "would lose its end: say --shrink"},
		{[]string{"disk", "resize", "here", "7", "4K"}, exit.Failure, "no disk 7"},
		{[]string{"stop", "--grace", "2h", "here"}, exit.Usage, "out of range"},
		{[]string{"run", "payload"}, exit.Usage, "goes behind --"},
		{[]string{"run", "--cpus", "0"}, exit.Usage, `cpus: "0": out of range: use 1 to 64`},
		{[]string{"run", "--cpus", "x"}, exit.Usage, "invalid argument"},
		{[]string{"run", "--memory", "12Q"}, exit.Usage, "is not a size"},
		{[]string{"run", "--tracker", "kvm"}, exit.Usage, `unknown tracker "kvm": use auto, wp-async`},
		{[]string{"run", "--tracker", "wp-async", "-m", "1G,memfd"}, exit.Usage, `memory.tracker: "wp-async": cannot follow memfd memory`},
		{[]string{"run", "--names", "some"}, exit.Usage, "neither on nor off"},
		{[]string{"run", "--hugepages", "4M"}, exit.Usage, "use thp, 2M, 1G or off"},
		{[]string{"run", "--hugepages", "1G"}, exit.Usage, "use --hugepages thp"},
		{[]string{"run", "--disk", "a,b=c"}, exit.Usage, "unknown option"},
		{[]string{"run", "--net", "tap", "-p", "80:80"}, exit.Usage, "no user-mode network"},
		{[]string{"run", "--name", "a b"}, exit.Usage, "not a usable name"},
		{[]string{"run", "-f", "/absent.yaml"}, exit.Usage, "/absent.yaml"},
		{[]string{"run", "--log-level", "loud", "--kernel", "payload:x"}, exit.Usage, "use debug, info, warn or error"},
		{[]string{"run", "--kernel", "payload:broken", "--sandbox=off"}, exit.Failure, "ditto: broken; in two lines\n"},
		{[]string{"run", "--kernel", "/absent/vmlinuz"}, exit.Kernel, "/absent/vmlinuz"},
		{[]string{"image", "disk", "/absent/x", "--size", "big"}, exit.Usage, "is not a size"},
		{[]string{"image", "u-root", "--file", "x", "--kernel", "/absent"}, exit.Kernel, "/absent"},
	} {
		code, out, errs := h.do(test.args...)
		if code != test.code || !strings.Contains(errs, test.want) || strings.Count(errs, "\n") != 1 || !strings.HasPrefix(errs, "ditto: ") || out != "" {
			t.Errorf("ditto %s: code %d, want %d; %q, want one line with %q; output %q", strings.Join(test.args, " "), code, test.code, errs, test.want, out)
		}
	}
	if left, err := h.registry.List(); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestRunConfig checks what the flags do, alone and over a file.
func TestRunConfig(t *testing.T) {
	h := newHost(t)
	file := filepath.Join(t.TempDir(), "vm.yaml")
	if err := os.WriteFile(file, []byte("name: web\ncpus: 3\ncmdline: {append: one}\ndisks: [{path: a.img}]\nballoon: {size: 4M}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	folder, err := os.Getwd()
	if err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		args   []string
		change func(*config.Config)
	}{
		{nil, func(*config.Config) {}},
		{[]string{"-c", "2", "-m", "2G,memfd", "--hugepages", "2M", "-k", "6.1", "-i", "none", "-a", "x", "-a", "y=z"}, func(c *config.Config) {
			c.CPUs, c.Memory.Size, c.Memory.Backing, c.Memory.HugePages = 2, 2<<30, 1, 2
			c.Kernel, c.Initrd, c.Cmdline.Append = "6.1", "none", "y=z"
		}},
		{[]string{"--memory", "memfd"}, func(c *config.Config) { c.Memory.Backing = 1 }},
		{[]string{"--disk", "a,ro", "--disk", "/b", "-p", "80:81", "--net", "tap", "--net", "user,mtu=1400", "-p", "5:6/udp"}, func(c *config.Config) {
			c.Disks = []config.Disk{{Path: filepath.Join(folder, "a"), ReadOnly: true}, {Path: "/b"}}
			c.Nets = []config.Net{{Mode: config.NetTap}, {MTU: 1400, Forwards: []config.Forward{
				{Protocol: "tcp", HostPort: 80, GuestPort: 81}, {Protocol: "udp", HostPort: 5, GuestPort: 6}}}}
		}},
		{[]string{"--net", "none", "--rng=off", "--balloon", "off", "--console", "virtio", "--sandbox=off", "--on-reboot", "stop", "--reboot-limit", "2"}, func(c *config.Config) {
			c.Nets, c.RNG, c.Balloon.Enabled, c.Console, c.Sandbox = []config.Net{}, false, false, config.ConsoleVirtio, false
			c.OnReboot, c.RebootLimit = config.RebootStop, 2
		}},
		{[]string{"-f", file, "--cpus", "4", "--append", "two", "--balloon", "8M", "--", "ls", "-l"}, func(c *config.Config) {
			c.Name, c.CPUs, c.Cmdline.Append, c.Balloon.Size = "web", 4, "one two", 8<<20
			c.Disks = []config.Disk{{Path: filepath.Join(filepath.Dir(file), "a.img")}}
			c.Command = []string{"ls", "-l"}
		}},
	} {
		want := config.Default()
		test.change(&want)
		out := h.want(append([]string{"run", "--print-config"}, test.args...)...)
		got, err := config.Parse([]byte(out))
		if diff := cmp.Diff(want, got); diff != "" || err != nil {
			t.Errorf("%v: %v\n%s", test.args, err, diff)
		}
	}
}

func TestVersion(t *testing.T) {
	h := newHost(t)
	if out := h.want("version"); out != "ditto v1.2.3 0123456789ab, go1, p\n" {
		t.Errorf("%q", out)
	}
	var v Version
	if err := json.Unmarshal([]byte(h.want("version", "--json")), &v); err != nil || v.Commit != "0123456789abcdef" {
		t.Errorf("%+v, %v", v, err)
	}
	if v := buildVersion("v9"); v.Go == "" || v.Version != "v9" {
		t.Errorf("%+v", v)
	}
}

func TestCompletion(t *testing.T) {
	h := newHost(t)
	done := h.start("alpha")
	for _, test := range []struct {
		args []string
		want string
	}{
		{[]string{"stop", ""}, "alpha\n"},
		{[]string{"stop", "alpha", ""}, ""},
		{[]string{"logs", ""}, "alpha\n"},
		{[]string{"stats", "alpha", ""}, ""},
		{[]string{"run", "--console", ""}, "serial\nvirtio\n"},
		{[]string{"run", "--tracker", ""}, "auto\nwp-async\nkvm-log\nkvm-ring\nnone\n"},
		{[]string{"run", "--names", ""}, "on\noff\n"},
		{[]string{"run", "--hugepages", ""}, "thp\n2M\n1G\noff\n"},
	} {
		code, out, _ := h.do(append([]string{"__complete"}, test.args...)...)
		words, _, _ := strings.Cut(out, ":")
		if code != 0 || words != test.want {
			t.Errorf("%v: %q, want %q", test.args, words, test.want)
		}
	}
	h.want("kill", "alpha")
	<-done
}

// TestEveryCommandHasHelp keeps commands from being added without words.
func TestEveryCommandHasHelp(t *testing.T) {
	root := newHost(t).env(io.Discard, io.Discard).NewRoot()
	commands := root.Commands()
	for i := 0; i < len(commands); i++ {
		c := commands[i]
		if c.Name() == "completion" || c.Name() == "help" {
			continue
		}
		commands = append(commands, c.Commands()...)
		if c.Short == "" || len(c.Commands()) == 0 && c.Example == "" && c.Name() != "version" {
			t.Errorf("%s has no help or no example", c.CommandPath())
		}
		if !c.HasParent() || c.Parent() == root && c.GroupID == "" {
			t.Errorf("%s is in no group", c.CommandPath())
		}
	}
	if !strings.Contains(root.Long, "  10  the guest's kernel panicked") {
		t.Error("no exit codes in the help")
	}
}
