package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// process is one command of the host's.
type process struct {
	conn   *wire.Conn
	run    uint32
	cmd    *exec.Cmd
	cgroup string

	stdin    chan []byte // capacity wire.StdinWindow
	stdinEOF bool        // stdin is closed; only the port's reader asks
	pty      *os.File    // master, or nil
}

// output is one stream of the command: what is read from r becomes frames.
type output struct {
	r *os.File
	t wire.Type
}

// startProcess starts cmd. Its streams and its end are reported on conn.
func startProcess(conn *wire.Conn, run uint32, cmd wire.Command, cgroup string) (*process, error) {
	if len(cmd.Args) == 0 {
		return nil, errors.New("no command")
	}
	path, err := lookPath(cmd)
	if err != nil {
		return nil, err
	}
	p := &process{
		conn:   conn,
		run:    run,
		cgroup: cgroup,
		stdin:  make(chan []byte, wire.StdinWindow),
		cmd: &exec.Cmd{
			Path:        path,
			Args:        cmd.Args,
			Env:         cmd.Env,
			Dir:         cmd.Dir,
			SysProcAttr: &syscall.SysProcAttr{Setsid: true},
		},
	}
	if fi, err := os.Stat(cmd.Dir); err != nil || !fi.IsDir() {
		p.cmd.Dir = "/" // a folder that was made after the lab had looked
	}
	if err := os.MkdirAll(cgroup, 0o755); err == nil {
		if fd, err := unix.Open(cgroup, unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err == nil {
			defer func() { _ = unix.Close(fd) }()
			p.cmd.SysProcAttr.UseCgroupFD, p.cmd.SysProcAttr.CgroupFD = true, fd
		}
	}
	var stdin *os.File
	var outputs []output
	var theirs []*os.File
	if cmd.Terminal {
		stdin, outputs, theirs, err = p.openTerminal(cmd.Rows, cmd.Cols)
	} else {
		stdin, outputs, theirs, err = p.openPipes()
	}
	if err == nil {
		err = p.cmd.Start()
	}
	for _, f := range theirs {
		_ = f.Close()
	}
	if err != nil {
		if stdin != nil {
			_ = stdin.Close()
		}
		for _, o := range outputs {
			_ = o.r.Close()
		}
		return nil, err
	}
	go p.feed(stdin)
	go p.wait(outputs)
	return p, nil
}

// lookPath finds the file to execute with the PATH of the command's own
// environment.
func lookPath(cmd wire.Command) (string, error) {
	name := cmd.Args[0]
	if cmd.Path != "" {
		return cmd.Path, nil
	}
	if strings.Contains(name, "/") {
		if !filepath.IsAbs(name) {
			name = filepath.Join(cmd.Dir, name)
		}
		return name, nil
	}
	var path string
	for _, kv := range cmd.Env {
		if v, ok := strings.CutPrefix(kv, "PATH="); ok {
			path = v
		}
	}
	for _, dir := range filepath.SplitList(path) {
		file := filepath.Join(dir, name)
		if fi, err := os.Stat(file); err == nil && fi.Mode().IsRegular() && fi.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: %w in PATH", name, exec.ErrNotFound)
}

// openPipes connects the command to pipes. theirs are the command's ends.
func (p *process) openPipes() (stdin *os.File, outputs []output, theirs []*os.File, err error) {
	in, stdin, err := os.Pipe()
	if err != nil {
		return nil, nil, nil, err
	}
	theirs = append(theirs, in)
	p.cmd.Stdin = in
	for _, o := range []struct {
		dst *io.Writer
		t   wire.Type
	}{{&p.cmd.Stdout, wire.Stdout}, {&p.cmd.Stderr, wire.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return stdin, outputs, theirs, err
		}
		outputs, theirs = append(outputs, output{r, o.t}), append(theirs, w)
		*o.dst = w
	}
	return stdin, outputs, theirs, nil
}

// feed writes the host's input to the command.
func (p *process) feed(stdin *os.File) {
	broken := false
	for b := range p.stdin {
		if !broken {
			_, err := stdin.Write(b)
			broken = err != nil
		}
		if p.conn.Write(wire.StdinAck, p.run, nil) != nil {
			broken = true
		}
	}
	if p.pty != nil {
		return // closed when the command has ended
	}
	_ = stdin.Close()
}

// putStdin hands input to feed. It never blocks while the host keeps to
// wire.StdinWindow.
func (p *process) putStdin(b []byte) error {
	if p.stdinEOF {
		return errors.New("input after its end")
	}
	select {
	case p.stdin <- b:
		return nil
	default:
		return errors.New("more input than the window allows")
	}
}

func (p *process) closeStdin() {
	if !p.stdinEOF {
		p.stdinEOF = true
		close(p.stdin)
	}
}

// wait forwards the output and reports the end. Processes that outlive the
// command keep running, but what they print from then on is lost.
func (p *process) wait(outputs []output) {
	var wg sync.WaitGroup
	for _, o := range outputs {
		wg.Go(func() { p.forward(o) })
	}
	err := p.cmd.Wait()
	for _, o := range outputs {
		_ = o.r.SetReadDeadline(time.Now())
	}
	wg.Wait()
	for _, o := range outputs {
		_ = o.r.Close()
	}
	_ = os.Remove(p.cgroup) // fails while anything still runs in it
	_ = p.conn.WriteJSON(wire.Exit, p.run, result(err))
}

// forward copies one stream until it ends, or until the deadline that wait
// sets, and then takes what is left in it.
func (p *process) forward(o output) {
	buf := make([]byte, wire.MaxData)
	for {
		n, err := o.r.Read(buf)
		if n > 0 && p.conn.Write(o.t, p.run, buf[:n]) != nil {
			return
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			break
		}
		if err != nil {
			return
		}
	}
	raw, err := o.r.SyscallConn()
	if err != nil {
		return
	}
	for {
		var n int
		if cerr := raw.Control(func(fd uintptr) { n, err = unix.Read(int(fd), buf) }); cerr != nil || err != nil || n <= 0 {
			return // nothing left, or the end
		}
		if p.conn.Write(o.t, p.run, buf[:n]) != nil {
			return
		}
	}
}

// result turns what Wait returned into an exit status as shells count it.
func result(err error) wire.Result {
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		if err != nil {
			return wire.Result{Error: err.Error()}
		}
		return wire.Result{}
	}
	if ws, ok := exit.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return wire.Result{Code: 128 + int(ws.Signal())}
	}
	return wire.Result{Code: exit.ExitCode()}
}

// signal sends sig to the command's process group, or, for SIGKILL, ends
// everything that the command has started.
func (p *process) signal(sig unix.Signal) {
	if sig == unix.SIGKILL {
		_ = os.WriteFile(filepath.Join(p.cgroup, "cgroup.kill"), []byte("1"), 0)
	}
	_ = unix.Kill(-p.cmd.Process.Pid, sig)
}
