package netd

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"
)

// Process is a running ditto-netd.
type Process struct {
	// Status is what it said when it became ready; see [Process.Ready].
	Status Status

	cmd    *exec.Cmd
	status *os.File
}

// Find returns the path of ditto-netd: next to the running executable, or in
// $PATH.
func Find() (string, error) {
	if exe, err := os.Executable(); err == nil {
		path := filepath.Join(filepath.Dir(exe), "ditto-netd")
		if info, err := os.Stat(path); err == nil && info.Mode()&0o111 != 0 {
			return path, nil
		}
	}
	path, err := exec.LookPath("ditto-netd")
	if err != nil {
		return "", fmt.Errorf("ditto-netd is neither next to ditto nor in $PATH: install it, or use another network: %w", err)
	}
	return path, nil
}

// Start runs the program at path and waits until it is ready: [Begin] and then
// [Process.Ready]. ctx bounds the start only.
func Start(ctx context.Context, path string, config Config, stderr io.Writer) (*Process, *os.File, error) {
	p, socket, err := Begin(path, config, stderr)
	if err != nil {
		return nil, nil, err
	}
	if _, err := p.Ready(ctx); err != nil {
		_ = socket.Close()
		_ = p.Kill()
		_ = p.Wait() // its exit code is in the error
		return nil, nil, err
	}
	return p, socket, nil
}

// Begin runs the program at path and returns the VM's end of the socket, which
// the caller closes to end the process. Frames may be sent at once; they wait
// in the socket until the process is ready, tens of milliseconds later. What it
// logs goes to stderr.
//
// Ports of forwards that are taken are found before anything is started, and
// are a [*StartError]. One that is taken at the last moment, and all other
// trouble, is what [Process.Ready] returns.
//
// The process is in a process group of its own, so that a Ctrl-C meant for the
// VM's terminal does not reach it.
func Begin(path string, config Config, stderr io.Writer) (*Process, *os.File, error) {
	if err := ProbeForwards(config.Forwards); err != nil {
		return nil, nil, err
	}
	pair, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("socketpair: %w", err)
	}
	ours, theirs := os.NewFile(uintptr(pair[0]), "netd"), os.NewFile(uintptr(pair[1]), "netd peer")
	defer func() { _ = theirs.Close() }()
	status, statusPeer, err := os.Pipe()
	if err != nil {
		_ = ours.Close()
		return nil, nil, fmt.Errorf("status pipe: %w", err)
	}
	defer func() { _ = statusPeer.Close() }()

	config.FD, config.StatusFD, config.Listen = 3, 4, ""
	cmd := exec.Command(path, config.Args()...)
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{theirs, statusPeer}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		_, _ = ours.Close(), status.Close()
		return nil, nil, fmt.Errorf("start ditto-netd: %w", err)
	}
	return &Process{cmd: cmd, status: status}, ours, nil
}

// Ready waits until the process serves the socket and every forward. An error
// is a [*StartError], or that ctx ended; the process is then still to be
// killed. It is called once.
func (p *Process) Ready(ctx context.Context) (Status, error) {
	defer func() { _ = p.status.Close() }()
	// Wake the read below when ctx ends.
	stop := context.AfterFunc(ctx, func() { _ = p.status.SetReadDeadline(time.Unix(1, 0)) })
	defer stop()
	s, err := ReadStatus(p.status)
	if err != nil && ctx.Err() != nil {
		return Status{}, fmt.Errorf("start ditto-netd: %w", ctx.Err())
	}
	if err == nil {
		p.Status = s
	}
	return s, err
}

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Wait reaps the process and returns how it ended: nil after the socket was
// closed.
func (p *Process) Wait() error { return p.cmd.Wait() }

// Kill ends the process at once; [Process.Wait] is still due.
func (p *Process) Kill() error { return p.cmd.Process.Kill() }
