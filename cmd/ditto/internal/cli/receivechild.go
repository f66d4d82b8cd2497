package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/cmd/ditto/internal/vmproc"
	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/sandbox"
)

// receiveJob is what a receiving process is to do.
type receiveJob struct {
	// Words are the flags of arrivalFlags.
	Words    []string         `json:"words,omitempty"`
	TLS      *pki.Credentials `json:"tls,omitempty"`
	LogLevel slog.Level       `json:"log_level"`
	// Insecure: without TLS, everybody who can connect may send machines, and not
	// only the same user of the same host.
	Insecure bool `json:"insecure,omitempty"`
	// Stdio: the machine comes over two descriptors instead of a listener.
	Stdio bool `json:"stdio,omitempty"`
	// Upgrade: the machine comes from another process of this host.
	Upgrade *upgradeJob `json:"upgrade,omitempty"`
	// Once and JSON are of the process that waits.
	Once bool `json:"once,omitempty"`
	JSON bool `json:"json,omitempty"`
}

// The descriptors of a receiving process: a listener, or what comes in and what
// goes out.
const (
	socketFD = 5
	stdinFD  = 5
	stdoutFD = 6
)

// outcomesFolder is where outcomes are kept, in the run directory.
const outcomesFolder = ".migrations"

// receiveMain is a process that receives a machine and becomes it. jobs stays
// open as long as somebody waits for it.
func (e *Env) receiveMain(job receiveJob, jobs io.ReadCloser, answer *os.File) int {
	tell := &teller{out: json.NewEncoder(answer)}
	fail := func(err error) int {
		code := vmproc.Classify(err)
		tell.event(vmproc.ReceiveEvent{Event: vmproc.ReceiveFailed, Error: oneLine(err), Code: code})
		return code
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: job.LogLevel}))
	accept, release, err := acceptFor(job, log)
	if err != nil {
		return fail(err)
	}
	r, err := e.Registry()
	if err != nil {
		return fail(err)
	}
	outcomes, err := vmproc.OpenOutcomes(filepath.Join(r.RunDir(), outcomesFolder))
	if err != nil {
		return fail(err)
	}
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, unix.SIGTERM)
	signal.Ignore(unix.SIGHUP, unix.SIGINT)
	orphaned, canceled := watch(jobs)
	var handed *remotemigrate.Belongings
	machine := config.Config{}
	if job.Upgrade != nil {
		handed, machine.Name = job.Upgrade.files(), job.Upgrade.Name
	}
	tell.event(vmproc.ReceiveEvent{Event: receiveReady})
	code, _ := vmproc.Receive(context.Background(), vmproc.ReceiveOptions{
		Handed: handed,
		Options: vmproc.Options{
			Config: machine, Registry: r, Version: e.Version.String(), Sandbox: sandbox.Apply, Signals: signals,
			Log: func(stateDir string) (*slog.Logger, error) { return job.openLog(stateDir) },
		},
		Configure: func(o *live.Offer) (config.Config, error) { return arrivalConfig(o, job.Words) },
		Arrive:    e.Arrive, Accept: accept, Release: release, Outcomes: outcomes,
		Tell: tell.event, Orphaned: orphaned, Cancel: canceled, FirstLog: log,
	})
	return code
}

// openLog opens the process's own log, which an upgraded machine has already.
func (j receiveJob) openLog(stateDir string) (*slog.Logger, error) {
	if j.Upgrade != nil {
		return continueOwnLog(stateDir, j.LogLevel)
	}
	return openOwnLog(stateDir, j.LogLevel)
}

// watch returns a channel that is closed when the process at the other end of the
// pipe has ended, or does not care any more, and one that is closed when it wants
// the migration to end.
func watch(pipe io.ReadCloser) (gone, canceled <-chan struct{}) {
	end, wish := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(end)
		if n, _ := pipe.Read(make([]byte, 1)); n > 0 {
			close(wish)
			_, _ = io.Copy(io.Discard, pipe)
		}
		_ = pipe.Close()
	}()
	return end, wish
}

// teller sends events from any goroutine. Who does not listen misses them.
type teller struct {
	mu  sync.Mutex // guards out
	out *json.Encoder
}

func (t *teller) event(ev vmproc.ReceiveEvent) {
	t.mu.Lock()
	defer t.mu.Unlock()
	_ = t.out.Encode(ev)
}

// acceptFor returns where a machine comes from, and what gives it back.
func acceptFor(job receiveJob, log *slog.Logger) (live.Accepter, func() error, error) {
	if job.Stdio {
		c, err := newStdioConn(stdinFD, stdoutFD)
		if err != nil {
			return nil, nil, err
		}
		return c.accept, c.Close, nil
	}
	unix.CloseOnExec(socketFD)
	f := os.NewFile(socketFD, "socket")
	l, err := net.FileListener(f)
	if err = errors.Join(err, f.Close()); err != nil {
		return nil, nil, fmt.Errorf("receive: %w", err)
	}
	accept, refused := live.AcceptFrom(l), &refusals{log: log}
	switch {
	case job.TLS == nil && job.Insecure:
		return accept, l.Close, nil
	case job.TLS == nil:
		return ownUser(accept, refused), l.Close, nil
	}
	config, err := job.TLS.Server()
	if err != nil {
		return nil, nil, err
	}
	return func(ctx context.Context) (net.Conn, error) {
		c, err := accept(ctx)
		if err != nil {
			return nil, err
		}
		return &tlsConn{Conn: pki.Server(c, config), refused: refused}, nil
	}, l.Close, nil
}

// ownUser lets in connections of this user, and of root.
func ownUser(accept live.Accepter, refused *refusals) live.Accepter {
	return func(ctx context.Context) (net.Conn, error) {
		for {
			c, err := accept(ctx)
			if err != nil {
				return nil, err
			}
			err = checkPeerUser(c)
			if err == nil {
				return c, nil
			}
			refused.tell(c.RemoteAddr(), err)
			_ = c.Close() // it was refused
		}
	}
}

// tlsConn is a connection whose handshake is made when it is first read: within
// the limits that a connection has that has not said what it is.
type tlsConn struct {
	*pki.Conn
	refused *refusals
	once    sync.Once
}

// Read implements net.Conn.
func (c *tlsConn) Read(p []byte) (int, error) {
	var failed error
	c.once.Do(func() {
		if err := c.Handshake(); err != nil {
			failed = pki.Handshake(err)
			c.refused.tell(c.RemoteAddr(), failed)
		}
	})
	if failed != nil {
		return 0, failed
	}
	return c.Conn.Read(p)
}

// refusals tells of connections that were refused, at most one a second.
type refusals struct {
	log     *slog.Logger
	last    atomic.Int64 // when, in Unix nanoseconds
	skipped atomic.Int64
}

func (r *refusals) tell(peer net.Addr, err error) {
	now, last := time.Now().UnixNano(), r.last.Load()
	if now-last < int64(time.Second) || !r.last.CompareAndSwap(last, now) {
		r.skipped.Add(1)
		return
	}
	r.log.Warn("a connection was refused", "peer", peer.String(), "err", err, "others", r.skipped.Swap(0))
}

// stdioConn is a connection over two descriptors, such as those that sshd gives.
type stdioConn struct {
	in, out *os.File
	once    sync.Once
	given   atomic.Bool
	closed  chan struct{}
	err     error // of Close
}

func newStdioConn(in, out int) (*stdioConn, error) {
	for _, fd := range []int{in, out} {
		unix.CloseOnExec(fd)
		// So that they can be waited for with a limit.
		if err := unix.SetNonblock(fd, true); err != nil {
			return nil, fmt.Errorf("standard input and output: %w", err)
		}
	}
	c := &stdioConn{in: os.NewFile(uintptr(in), "stdin"), out: os.NewFile(uintptr(out), "stdout"), closed: make(chan struct{})}
	if err := c.SetDeadline(time.Time{}); err != nil {
		return nil, exit.New(exit.Usage, fmt.Errorf("--stdio is for pipes and sockets, as 'ditto migrate' with ssh:// makes them: %w", err))
	}
	return c, nil
}

// accept gives the connection once. Nobody else comes.
func (c *stdioConn) accept(ctx context.Context) (net.Conn, error) {
	if c.given.CompareAndSwap(false, true) {
		return c, nil
	}
	select {
	case <-c.closed:
		return nil, net.ErrClosed
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Read implements net.Conn.
func (c *stdioConn) Read(p []byte) (int, error) { return c.in.Read(p) }

// Write implements net.Conn.
func (c *stdioConn) Write(p []byte) (int, error) { return c.out.Write(p) }

// Close implements net.Conn.
func (c *stdioConn) Close() error {
	c.once.Do(func() {
		c.err = errors.Join(c.in.Close(), c.out.Close())
		close(c.closed)
	})
	return c.err
}

// stdioAddr says where a peer is that ssh knows.
type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "stdio" }

// LocalAddr implements net.Conn.
func (c *stdioConn) LocalAddr() net.Addr { return stdioAddr{} }

// RemoteAddr implements net.Conn.
func (c *stdioConn) RemoteAddr() net.Addr { return stdioAddr{} }

// SetDeadline implements net.Conn.
func (c *stdioConn) SetDeadline(t time.Time) error {
	return errors.Join(c.in.SetReadDeadline(t), c.out.SetWriteDeadline(t))
}

// SetReadDeadline implements net.Conn.
func (c *stdioConn) SetReadDeadline(t time.Time) error { return c.in.SetReadDeadline(t) }

// SetWriteDeadline implements net.Conn.
func (c *stdioConn) SetWriteDeadline(t time.Time) error { return c.out.SetWriteDeadline(t) }
