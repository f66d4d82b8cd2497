package lab

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// killLimit bounds how long a killed command may take to end before its port is
// given up.
const killLimit = 15 * time.Second

// Cmd is a command to run in a lab.
type Cmd struct {
	// Args is the program and its arguments. The program is looked up in the
	// PATH of Env.
	Args []string
	// Env is the environment; nil means that of this process. EnvInside is
	// added.
	Env []string
	// Dir is the working folder; "" means that of this process.
	Dir string
	// Stdin may be nil. Run does not wait for a Read of it that is in progress
	// when the command ends.
	Stdin io.Reader
	// Stdout and Stderr may be nil.
	Stdout, Stderr io.Writer
	// Terminal, if not nil, runs the command on a pseudo-terminal, whose output
	// goes to Stdout.
	Terminal *Terminal
}

// Terminal is the size of a terminal.
type Terminal struct {
	Rows, Cols uint16
	// Resized, if not nil, brings changes.
	Resized <-chan Terminal
}

// Run runs a command and returns its exit status: 128 plus the number of the
// signal if one killed it. The error tells that it was not run to its end. When
// ctx ends, the command and all it started are killed. Up to [MaxRuns] commands
// run at once; more wait. Processes that outlive the command go on.
func (l *Lab) Run(ctx context.Context, cmd *Cmd) (int, error) {
	start, err := l.command(cmd)
	if err != nil {
		return -1, err
	}
	var p *port
	select {
	case p = <-l.idle:
	case <-l.vm.done:
		return -1, fmt.Errorf("lab: %w", l.deathCause())
	case <-ctx.Done():
		return -1, fmt.Errorf("lab: %w", ctx.Err())
	}
	p.run++
	r := &running{p: p, cmd: cmd, run: p.run, acks: make(chan struct{}, wire.StdinWindow), ended: make(chan struct{})}
	if err := p.conn.WriteJSON(wire.Start, p.run, start); err != nil {
		return -1, fmt.Errorf("lab: %w", l.deathCause())
	}
	res, err := r.loop(ctx, l)
	if err != nil {
		return -1, err
	}
	l.idle <- p
	switch {
	case ctx.Err() != nil:
		return res.Code, fmt.Errorf("lab: %s: %w", cmd.Args[0], context.Cause(ctx))
	case res.Error != "":
		return -1, fmt.Errorf("lab: %s: %s", cmd.Args[0], res.Error)
	}
	return res.Code, nil
}

// command turns cmd into what the agent is told.
func (l *Lab) command(cmd *Cmd) (wire.Command, error) {
	if len(cmd.Args) == 0 {
		return wire.Command{}, fmt.Errorf("lab: no command")
	}
	c := wire.Command{Args: cmd.Args, Env: cmd.Env, Dir: cmd.Dir}
	if c.Env == nil {
		c.Env = os.Environ()
	}
	c.Env = append(c.Env[:len(c.Env):len(c.Env)], EnvInside+"=1")
	if c.Dir == "" {
		dir, err := os.Getwd()
		if err != nil {
			return c, fmt.Errorf("lab: %w", err)
		}
		c.Dir = dir
	}
	if cmd.Terminal != nil {
		c.Terminal, c.Rows, c.Cols = true, cmd.Terminal.Rows, cmd.Terminal.Cols
	}
	var err error
	c.Path, err = l.freshProgram(cmd.Args[0], c.Dir)
	return c, err
}

// identity tells one content of a path from another.
type identity struct {
	dev, ino uint64
	mtime    unix.Timespec
	size     int64
}

// freshProgram returns a path at which the lab finds the program as it now is,
// or "" if it finds it where it is.
func (l *Lab) freshProgram(name, dir string) (string, error) {
	path := name
	if filepath.Base(name) == name {
		found, err := exec.LookPath(name)
		if err != nil {
			return "", nil // the agent looks again, and says so
		}
		path = found
	}
	if !filepath.IsAbs(path) {
		path = filepath.Join(dir, path)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil || st.Mode&unix.S_IFMT != unix.S_IFREG {
		return "", nil // it may exist inside only
	}
	id := identity{dev: st.Dev, ino: st.Ino, mtime: st.Mtim, size: st.Size}
	l.mu.Lock()
	old, seen := l.programs[path]
	if !seen {
		l.programs[path] = id
	}
	l.mu.Unlock()
	if !seen || old == id {
		return "", nil
	}
	return l.Copy(path)
}

// Copy puts a copy of a file into the share and returns its path inside the
// lab, which is a new one each time.
func (l *Lab) Copy(path string) (string, error) {
	l.mu.Lock()
	l.copies++
	name := strconv.Itoa(l.copies)
	l.mu.Unlock()
	in, err := os.Open(path)
	if err != nil {
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	defer func() { _ = in.Close() }()
	fi, err := in.Stat()
	if err != nil {
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	dir := filepath.Join("copies", name)
	if err := os.MkdirAll(filepath.Join(l.ShareDir(), dir), 0o755); err != nil {
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	inside := filepath.Join(dir, filepath.Base(path))
	out, err := os.OpenFile(filepath.Join(l.ShareDir(), inside), os.O_CREATE|os.O_EXCL|os.O_WRONLY, fi.Mode().Perm())
	if err != nil {
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	if _, err := io.Copy(out, in); err != nil {
		_ = out.Close()
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	if err := out.Close(); err != nil {
		return "", fmt.Errorf("lab: copy: %w", err)
	}
	return filepath.Join(ShareDir, inside), nil
}

// Output runs a command with this process's environment and returns what it
// printed on stdout and stderr. An exit status other than 0 is an error.
func (l *Lab) Output(ctx context.Context, args ...string) ([]byte, error) {
	var out bytes.Buffer
	code, err := l.Run(ctx, &Cmd{Args: args, Stdout: &out, Stderr: &out})
	if err == nil && code != 0 {
		err = fmt.Errorf("lab: %q: exit status %d: %s", args, code, bytes.TrimSpace(out.Bytes()))
	}
	return out.Bytes(), err
}

// running is one command in progress.
type running struct {
	p     *port
	cmd   *Cmd
	run   uint32
	acks  chan struct{} // a token per acknowledged Stdin frame
	ended chan struct{} // closed when the command has ended
}

// loop serves the command until it ends. An error means that the port is lost.
func (r *running) loop(ctx context.Context, l *Lab) (wire.Result, error) {
	defer close(r.ended)
	go r.sendStdin()
	if r.cmd.Terminal != nil && r.cmd.Terminal.Resized != nil {
		go r.sendSizes()
	}
	stop := context.AfterFunc(ctx, r.kill)
	defer stop()

	frames := make(chan wire.Frame)
	failed := make(chan error, 1)
	go func() {
		for {
			f, err := r.p.conn.Read()
			if err != nil {
				failed <- err
				return
			}
			select {
			case frames <- f:
			case <-r.ended:
				return
			}
			if f.Type == wire.Exit && f.Run == r.run {
				return
			}
		}
	}()
	var overdue <-chan time.Time
	done := ctx.Done()
	for {
		select {
		case <-done:
			done = nil
			t := time.NewTimer(killLimit)
			defer t.Stop()
			overdue = t.C
		case <-overdue:
			l.vm.kill() // what cannot be killed would hold the reader for ever
			overdue = nil
		case err := <-failed:
			l.log.Debug("lab stream ended", "err", err)
			return wire.Result{}, fmt.Errorf("lab: %s: %w%s", r.cmd.Args[0], l.deathCause(), l.consoleTail())
		case f := <-frames:
			res, ended, err := r.handle(f)
			if err != nil || ended {
				return res, err
			}
		}
	}
}

// handle serves one frame and tells whether the command has ended.
func (r *running) handle(f wire.Frame) (res wire.Result, ended bool, err error) {
	if f.Run != r.run {
		return res, false, nil
	}
	switch f.Type {
	case wire.Stdout:
		write(r.cmd.Stdout, f.Payload)
	case wire.Stderr:
		write(r.cmd.Stderr, f.Payload)
	case wire.StdinAck:
		select {
		case r.acks <- struct{}{}:
		default:
		}
	case wire.Exit:
		if err := json.Unmarshal(f.Payload, &res); err != nil {
			return res, true, fmt.Errorf("lab: exit frame: %w", err)
		}
		return res, true, nil
	}
	return res, false, nil
}

// write drops output that nobody wants or that cannot be delivered, as a closed
// pipe would.
func write(w io.Writer, b []byte) {
	if w != nil {
		_, _ = w.Write(b)
	}
}

// sendStdin sends input until its end or the command's.
func (r *running) sendStdin() {
	if r.cmd.Stdin == nil {
		_ = r.p.conn.Write(wire.StdinEOF, r.run, nil)
		return
	}
	buf := make([]byte, wire.MaxData)
	window := wire.StdinWindow
	for {
		n, err := r.cmd.Stdin.Read(buf)
		if n > 0 {
			if window == 0 {
				select {
				case <-r.acks:
					window++
				case <-r.ended:
					return
				}
			}
			window--
			if !r.send(wire.Stdin, buf[:n]) {
				return
			}
		}
		if err != nil {
			r.send(wire.StdinEOF, nil)
			return
		}
	}
}

// send sends a frame unless the command has ended.
func (r *running) send(t wire.Type, payload []byte) bool {
	select {
	case <-r.ended:
		return false
	default:
		return r.p.conn.Write(t, r.run, payload) == nil
	}
}

// sendSizes sends changes of the terminal's size.
func (r *running) sendSizes() {
	for {
		select {
		case t := <-r.cmd.Terminal.Resized:
			b := binary.LittleEndian.AppendUint16(nil, t.Rows)
			r.send(wire.Resize, binary.LittleEndian.AppendUint16(b, t.Cols))
		case <-r.ended:
			return
		}
	}
}

func (r *running) kill() {
	r.send(wire.Signal, binary.LittleEndian.AppendUint32(nil, uint32(unix.SIGKILL)))
}
