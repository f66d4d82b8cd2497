package netd

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
)

// Process is a running ditto-netd.
type Process struct {
	// Status is what it said when it became ready.
	Status Status

	cmd *exec.Cmd
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

// Start runs the program at path and waits until it is ready; when it says that
// it is not, the error is a [*StartError]. It returns the VM's end of the
// socket, which the caller closes to end the process. What ditto-netd logs goes
// to stderr.
//
// The process is in a process group of its own, so that a Ctrl-C meant for the
// VM's terminal does not reach it. ctx bounds the start only.
func Start(ctx context.Context, path string, config Config, stderr io.Writer) (*Process, *os.File, error) {
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
	defer func() { _ = status.Close() }()

	config.FD, config.StatusFD, config.Listen = 3, 4, ""
	cmd := exec.Command(path, config.Args()...)
	cmd.Stderr = stderr
	cmd.ExtraFiles = []*os.File{theirs, statusPeer}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	err = cmd.Start()
	_ = statusPeer.Close()
	if err != nil {
		_ = ours.Close()
		return nil, nil, fmt.Errorf("start ditto-netd: %w", err)
	}
	// Wake the read below when ctx ends.
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Kill() })
	s, err := ReadStatus(status)
	if !stop() && ctx.Err() != nil {
		err = fmt.Errorf("start ditto-netd: %w", ctx.Err())
	}
	if err != nil {
		_ = ours.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // its exit code is in the status
		return nil, nil, err
	}
	return &Process{Status: s, cmd: cmd}, ours, nil
}

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Wait reaps the process and returns how it ended: nil after the socket was
// closed.
func (p *Process) Wait() error { return p.cmd.Wait() }

// Kill ends the process at once; [Process.Wait] is still due.
func (p *Process) Kill() error { return p.cmd.Process.Kill() }
