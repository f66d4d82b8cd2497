package bench

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// child is a running program whose output is watched.
type child struct {
	cmd     *exec.Cmd
	started time.Time // just before the fork
	out     *console
	errs    *tail
	stdin   *os.File // the program's input, or nil
	ended   chan struct{}
	err     error // valid once ended is closed
}

// startChild executes args[0] with its standard output watched and, if
// wantInput is set, a pipe as its standard input. The caller must call stop.
func startChild(args []string, wantInput bool) (*child, error) {
	outRead, outWrite, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	c := &child{cmd: exec.Command(args[0], args[1:]...), out: newConsole(), errs: &tail{}, ended: make(chan struct{})}
	// The group lets stop reach what the program started; the death signal
	// reaches it when this process is killed.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	c.cmd.Stdout = outWrite
	c.cmd.Stderr = c.errs
	c.cmd.WaitDelay = time.Second
	var inRead *os.File
	if wantInput {
		if inRead, c.stdin, err = os.Pipe(); err != nil {
			return nil, errors.Join(fmt.Errorf("start %s: %w", args[0], err), outRead.Close(), outWrite.Close())
		}
		c.cmd.Stdin = inRead
	}
	begun := make(chan error, 1)
	go func() {
		// The death signal is sent when the starting thread ends, so it must
		// live as long as the program.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		c.started = time.Now()
		err := c.cmd.Start()
		begun <- err
		if err == nil {
			c.watch(outRead)
		}
	}()
	err = <-begun
	_ = outWrite.Close()
	if inRead != nil {
		_ = inRead.Close()
	}
	if err != nil {
		_ = outRead.Close()
		if c.stdin != nil {
			_ = c.stdin.Close()
		}
		return nil, fmt.Errorf("start %s: %w", args[0], err)
	}
	return c, nil
}

// watch reads the output to its end, then waits for the program.
func (c *child) watch(out *os.File) {
	defer close(c.ended)
	buf := make([]byte, 16<<10)
	for {
		n, err := out.Read(buf)
		if n > 0 {
			c.out.add(buf[:n], time.Now())
		}
		if err != nil {
			break
		}
	}
	_ = out.Close()
	c.err = c.cmd.Wait()
	c.out.end()
}

// waitFor waits until marker stands in the output behind offset from, and
// returns the offset behind it and when its last byte was read.
func (c *child) waitFor(ctx context.Context, from int, marker string) (int, time.Time, error) {
	end, at, err := c.out.find(ctx, from, marker)
	if err != nil {
		return 0, time.Time{}, c.explain(fmt.Errorf("waiting for %q: %w", marker, err))
	}
	return end, at, nil
}

// explain adds to err what the program said last.
func (c *child) explain(err error) error {
	detail := strings.TrimSpace(c.errs.String())
	if detail == "" {
		detail = strings.TrimSpace(c.out.last(400))
	}
	if detail == "" {
		return err
	}
	return fmt.Errorf("%w; last output: %s", err, strings.Join(strings.Fields(detail), " "))
}

// stop kills the program and what it started, and waits for the end. It may be
// called again.
func (c *child) stop() {
	if c.stdin != nil {
		_ = c.stdin.Close()
	}
	select {
	case <-c.ended: // its id may be another's by now
	default:
		// Setpgid made the program the leader of a group of its own.
		_ = syscall.Kill(-c.cmd.Process.Pid, syscall.SIGKILL)
		<-c.ended
	}
}

// tail keeps the end of what is written to it.
type tail struct {
	mu  sync.Mutex
	buf []byte
}

const tailBytes = 2 << 10

func (t *tail) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.buf = append(t.buf, p...)
	if extra := len(t.buf) - tailBytes; extra > 0 {
		t.buf = t.buf[extra:]
	}
	return len(p), nil
}

func (t *tail) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(t.buf)
}

var _ io.Writer = (*tail)(nil)
