package main

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// binary builds ditto once, as it is released: without cgo.
var binary = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("/tmp", "ditto-test-")
	if err != nil {
		return "", err
	}
	path := filepath.Join(dir, "ditto")
	cmd := exec.Command("go", "build", "-o", path, ".")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("%w: %s", err, out)
	}
	return path, nil
})

func TestMain(m *testing.M) {
	code := m.Run()
	if path, err := binary(); err == nil {
		_ = os.RemoveAll(filepath.Dir(path))
	}
	os.Exit(code)
}

// home is a user's environment of its own.
type home struct {
	t      *testing.T
	path   string
	env    []string
	runDir string
	state  string
}

func newHome(t *testing.T) *home {
	t.Helper()
	path, err := binary()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/tmp", "ditto-home-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	h := &home{t: t, path: path, runDir: filepath.Join(dir, "run"), state: filepath.Join(dir, "state")}
	if err := os.Mkdir(h.runDir, 0o700); err != nil {
		t.Fatal(err)
	}
	h.env = append(os.Environ(), "XDG_RUNTIME_DIR="+h.runDir, "XDG_STATE_HOME="+h.state)
	t.Cleanup(h.endAll)
	return h
}

// endAll ends the machines that a test which failed has left.
func (h *home) endAll() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	run := func(args ...string) string {
		cmd := exec.CommandContext(ctx, h.path, args...)
		cmd.Env = h.env
		out, err := cmd.Output()
		if err != nil {
			h.t.Logf("ditto %s: %v", strings.Join(args, " "), err)
		}
		return string(out)
	}
	for name := range strings.FieldsSeq(run("ps", "-q")) {
		run("kill", name)
	}
}

// do runs ditto to its end with an empty standard input.
func (h *home) do(args ...string) (code int, out, errs string) {
	h.t.Helper()
	ctx, cancel := context.WithTimeout(h.t.Context(), time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, h.path, args...)
	cmd.Env = h.env
	var o, e bytes.Buffer
	cmd.Stdout, cmd.Stderr = &o, &e
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		h.t.Fatal(err)
	}
	return cmd.ProcessState.ExitCode(), o.String(), e.String()
}

// nothingLeft checks that no machine's folder is left.
func (h *home) nothingLeft() {
	h.t.Helper()
	entries, err := os.ReadDir(filepath.Join(h.runDir, "ditto"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		h.t.Error(err)
	}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			h.t.Errorf("%s is left in the run directory", e.Name())
		}
	}
}

func requireKVM(t *testing.T) {
	t.Helper()
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err == nil {
		_ = f.Close()
		return
	}
	if os.Getenv("DITTO_REQUIRE_KVM") != "" {
		t.Fatal(err)
	}
	t.Skipf("%v; try: sudo usermod -aG kvm $USER", err)
}

// TestStartupCost keeps the machine's process lean: what all initializers take
// together before main. Their time is only logged, since it tells how busy the
// host is; what they allocate is the same each time and bounds it.
func TestStartupCost(t *testing.T) {
	const maxBytes, maxAllocs = 480 << 10, 1700
	h := newHome(t)
	cmd := exec.Command(h.path, "version")
	cmd.Env = append(h.env, "GODEBUG=inittrace=1")
	var trace bytes.Buffer
	cmd.Stderr = &trace
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	type cost struct {
		name          string
		ms            float64
		bytes, allocs int
	}
	var all []cost
	var sum cost
	for line := range strings.Lines(trace.String()) {
		c := cost{}
		var at float64
		if _, err := fmt.Sscanf(line, "init %s @%f ms, %f ms clock, %d bytes, %d allocs", &c.name, &at, &c.ms, &c.bytes, &c.allocs); err != nil {
			continue // what the program says itself
		}
		all = append(all, c)
		sum.ms, sum.bytes, sum.allocs = sum.ms+c.ms, sum.bytes+c.bytes, sum.allocs+c.allocs
	}
	t.Logf("initializers of %d packages allocate %d bytes in %d pieces and took %.2f ms", len(all), sum.bytes, sum.allocs, sum.ms)
	if len(all) == 0 || sum.bytes > maxBytes || sum.allocs > maxAllocs {
		slices.SortFunc(all, func(a, b cost) int { return cmp.Compare(b.bytes, a.bytes) })
		t.Errorf("initializers allocate %d bytes in %d pieces, more than %d and %d; the largest: %+v",
			sum.bytes, sum.allocs, maxBytes, maxAllocs, all[:min(5, len(all))])
	}
}

// TestLean keeps out what would cost every machine's process time and memory.
func TestLean(t *testing.T) {
	out, err := exec.Command("go", "list", "-deps", ".").Output()
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range strings.Fields(string(out)) {
		for _, heavy := range []string{"github.com/prometheus/", "gvisor.dev/", "github.com/getkin/", "golang.org/x/tools/", "github.com/spf13/cobra/doc"} {
			if strings.HasPrefix(path, heavy) {
				t.Errorf("%s is linked into the machine's process", path)
			}
		}
	}
}

// TestPayloadInPlace runs a machine the way scripts do, sandbox and all.
func TestPayloadInPlace(t *testing.T) {
	requireKVM(t)
	h := newHome(t)
	code, out, errs := h.do("run", "--kernel", "payload:hello", "--net", "none", "--memory", "16M", "--name", "p")
	if code != 0 || strings.TrimSpace(out) != "hello" || errs != "" {
		t.Errorf("code %d, output %q, errors %q", code, out, errs)
	}
	h.nothingLeft()
	if _, log, _ := h.do("logs", "p"); strings.TrimSpace(log) != "hello" {
		t.Errorf("log %q", log)
	}
}

// TestPayloadDetached runs a machine in the background and waits for its end.
func TestPayloadDetached(t *testing.T) {
	requireKVM(t)
	h := newHome(t)
	code, out, errs := h.do("run", "-d", "--kernel", "payload:hello", "--net", "none", "--memory", "16M")
	if code != 0 || out != "vm1\n" || errs != "" {
		t.Fatalf("code %d, output %q, errors %q", code, out, errs)
	}
	// Follows the log until the machine has ended.
	if code, log, errs := h.do("logs", "-f", "vm1"); code != 0 || strings.TrimSpace(log) != "hello" || errs != "" {
		t.Errorf("code %d, log %q, errors %q", code, log, errs)
	}
	h.nothingLeft()
	data, err := os.ReadFile(filepath.Join(h.state, "ditto", "vm1", "exit.json"))
	var record struct {
		Reason string
		Code   int
	}
	if err == nil {
		err = json.Unmarshal(data, &record)
	}
	if err != nil || record.Reason != "status" || record.Code != 0 {
		t.Errorf("%s, %v", data, err)
	}
}

// TestDetachedFailure: what goes wrong in the background process is told in the
// foreground, with its exit code.
func TestDetachedFailure(t *testing.T) {
	requireKVM(t)
	h := newHome(t)
	for _, detach := range []string{"--detach=true", "--detach=false"} {
		code, out, errs := h.do("run", detach, "--kernel", "payload:hello", "--net", "none", "--disk", "/absent.img")
		if code != 7 || out != "" || !strings.Contains(errs, "/absent.img") || strings.Count(errs, "\n") != 1 {
			t.Errorf("%s: code %d, output %q, errors %q", detach, code, out, errs)
		}
		h.nothingLeft()
	}
}

// TestMachineProcessByHand: the hidden word is of no use to a person.
func TestMachineProcessByHand(t *testing.T) {
	h := newHome(t)
	if code, out, _ := h.do("__machine"); code == 0 || out != "" {
		t.Errorf("code %d, output %q", code, out)
	}
}
