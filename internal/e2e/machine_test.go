package e2e

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/internal/labtest"
)

// guestLimit bounds one guest; emulated ones are slow.
var guestLimit = time.Duration(labtest.Count(12, 60)) * time.Minute

// ditto returns the path of the built command.
func ditto(t testing.TB) string {
	t.Helper()
	labtest.Need(t)
	dir := os.Getenv(labtest.EnvBin)
	if dir == "" {
		t.Fatalf("%s is not set; try: make lab-test", labtest.EnvBin)
	}
	return filepath.Join(dir, "ditto")
}

// transcript collects what a process prints and wakes those who wait for a
// text.
type transcript struct {
	mu   sync.Mutex
	text bytes.Buffer
	more chan struct{}
}

func newTranscript() *transcript { return &transcript{more: make(chan struct{}, 1)} }

// Write implements io.Writer.
func (o *transcript) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	select {
	case o.more <- struct{}{}:
	default:
	}
	return o.text.Write(p)
}

// String returns everything so far.
func (o *transcript) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.text.String()
}

// machine is a running `ditto run` in the foreground.
type machine struct {
	*transcript
	cmd   *exec.Cmd
	stdin *os.File
	done  chan struct{}
	err   error // of Wait, once done is closed
}

// environment isolates a test's machines from all others.
func environment(t testing.TB) []string {
	t.Helper()
	dir := t.TempDir()
	run := filepath.Join(dir, "run")
	if err := os.Mkdir(run, 0o700); err != nil {
		t.Fatal(err)
	}
	return append(os.Environ(), "XDG_RUNTIME_DIR="+run, "XDG_STATE_HOME="+filepath.Join(dir, "state"))
}

// start runs ditto with args; the test ends it at the latest.
func start(t testing.TB, env []string, args ...string) *machine {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), guestLimit)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	m := &machine{transcript: newTranscript(), stdin: w, done: make(chan struct{})}
	m.cmd = exec.CommandContext(ctx, ditto(t), args...)
	m.cmd.Env = env
	m.cmd.Stdin, m.cmd.Stdout, m.cmd.Stderr = r, m.transcript, m.transcript
	m.cmd.Cancel = func() error { return m.cmd.Process.Signal(os.Interrupt) }
	m.cmd.WaitDelay = 20 * time.Second
	if err := m.cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	_ = r.Close()
	go func() {
		m.err = m.cmd.Wait()
		close(m.done)
	}()
	t.Cleanup(func() {
		cancel()
		<-m.done
		_ = w.Close()
	})
	return m
}

// expect waits until the output holds text, from offset on, and returns the
// offset behind it.
func (m *machine) expect(t testing.TB, offset int, text string) int {
	t.Helper()
	for {
		out := m.String()
		if i := strings.Index(out[min(offset, len(out)):], text); i >= 0 {
			return offset + i + len(text)
		}
		select {
		case <-m.more:
		case <-m.done:
			if !strings.Contains(m.String()[min(offset, len(m.String())):], text) {
				t.Fatalf("the machine ended (%v) without printing %q:\n%s", m.err, text, m)
			}
		}
	}
}

// wait returns the exit code.
func (m *machine) wait(t testing.TB) int {
	t.Helper()
	<-m.done
	var exit *exec.ExitError
	switch {
	case m.err == nil:
		return 0
	case errors.As(m.err, &exit):
		return exit.ExitCode()
	}
	t.Fatalf("%v:\n%s", m.err, m)
	return -1
}

// realFolder makes a folder of the test's own on a real file system: in the
// emulated host that is /lab.
func realFolder(t testing.TB) string {
	t.Helper()
	if labtest.Inside() {
		if d, err := os.MkdirTemp("/lab", "e2e-"); err == nil {
			t.Cleanup(func() { _ = os.RemoveAll(d) })
			return d
		}
	}
	return t.TempDir()
}

// copyDisk gives the test a disk of its own.
func copyDisk(t testing.TB, from string) string {
	t.Helper()
	to := filepath.Join(realFolder(t), filepath.Base(from))
	out, err := exec.CommandContext(t.Context(), "cp", "--sparse=always", from, to).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	return to
}
