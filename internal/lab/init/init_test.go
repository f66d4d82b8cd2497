package main

import (
	"bytes"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

func TestLookPath(t *testing.T) {
	dir := t.TempDir()
	for name, mode := range map[string]os.FileMode{"prog": 0o755, "data": 0o644} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	env := []string{"PATH=/nowhere", "A=1", "PATH=/nothing:" + dir}
	for _, tc := range []struct {
		cmd  wire.Command
		want string
		err  error
	}{
		{wire.Command{Args: []string{"prog"}, Env: env}, filepath.Join(dir, "prog"), nil},
		{wire.Command{Args: []string{"data"}, Env: env}, "", exec.ErrNotFound},
		{wire.Command{Args: []string{"prog"}}, "", exec.ErrNotFound},
		{wire.Command{Args: []string{"./prog"}, Dir: "/x"}, "/x/prog", nil},
		{wire.Command{Args: []string{"/y/prog"}, Dir: "/x"}, "/y/prog", nil},
		{wire.Command{Args: []string{"prog"}, Path: "/fresh/prog", Env: env}, "/fresh/prog", nil},
	} {
		got, err := lookPath(tc.cmd)
		if got != tc.want || !errors.Is(err, tc.err) {
			t.Errorf("lookPath(%+v) = %q, %v; want %q, %v", tc.cmd, got, err, tc.want, tc.err)
		}
	}
}

func TestStdinWindow(t *testing.T) {
	p := &process{stdin: make(chan []byte, wire.StdinWindow)}
	for range wire.StdinWindow {
		if err := p.putStdin([]byte("x")); err != nil {
			t.Fatal(err)
		}
	}
	if p.putStdin([]byte("x")) == nil {
		t.Error("more input was taken than the window allows")
	}
	p.closeStdin()
	p.closeStdin()
	if p.putStdin(nil) == nil {
		t.Error("input was taken after its end")
	}
}

// pipeEnd is one end of two in-memory streams.
type pipeEnd struct {
	io.Reader
	io.Writer
}

func TestProcess(t *testing.T) {
	r, w := io.Pipe()
	agent, host := wire.NewConn(pipeEnd{nil, w}), wire.NewConn(pipeEnd{r, nil})
	cmd := wire.Command{Args: []string{"/bin/sh", "-c", "cat; echo no >&2; sleep 1000 & exit 5"}, Dir: "/"}
	// A cgroup below a file cannot be made, so none is used.
	p, err := startProcess(agent, 7, cmd, "/dev/null/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	defer p.signal(unix.SIGKILL)
	if err := p.putStdin([]byte("input")); err != nil {
		t.Fatal(err)
	}
	p.closeStdin()
	got := map[wire.Type]string{}
	for {
		f, err := host.Read()
		if err != nil {
			t.Fatal(err)
		}
		if f.Run != 7 {
			t.Errorf("frame of run %d", f.Run)
		}
		got[f.Type] += string(f.Payload)
		if f.Type == wire.Exit {
			break
		}
	}
	want := map[wire.Type]string{wire.Stdout: "input", wire.Stderr: "no\n", wire.StdinAck: "", wire.Exit: `{"code":5}`}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("frames (-want +got):\n%s", diff)
	}
}

func TestStartProcessErrors(t *testing.T) {
	conn := wire.NewConn(&bytes.Buffer{})
	for name, cmd := range map[string]wire.Command{
		"empty":   {},
		"missing": {Args: []string{"/no/such/program"}, Dir: "/"},
	} {
		// A cgroup below a file cannot be made, so none is used.
		if p, err := startProcess(conn, 1, cmd, "/dev/null/cgroup"); err == nil {
			t.Errorf("%s: started %+v", name, p)
		}
	}
}

func TestResult(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 3": 3, "kill -9 $$": 137} {
		got := result(exec.Command("sh", "-c", script).Run())
		if got.Code != want || got.Error != "" {
			t.Errorf("%s: %+v, want %d", script, got, want)
		}
	}
	if got := result(errors.New("broken")); !strings.Contains(got.Error, "broken") {
		t.Errorf("an error that is no exit status: %+v", got)
	}
}
