package api

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

// Limits of the server.
const (
	maxConnections = 64
	maxHeaderBytes = 8 << 10
	headerTimeout  = 5 * time.Second
	readTimeout    = 10 * time.Second
	idleTimeout    = time.Minute
	// writeTimeout also bounds the handlers; a pause that drains slow disks
	// takes the longest.
	writeTimeout = time.Minute
)

// Server serves the API of one machine.
type Server struct {
	machine Machine
	log     *slog.Logger
	http    http.Server
	serving sync.WaitGroup

	ctx    context.Context // ends with Close, and with it a stop in progress
	cancel context.CancelFunc

	mu       sync.Mutex // guards what follows
	stopping bool
	closed   bool
}

// NewServer returns a server of m that does not listen yet.
func NewServer(m Machine, log *slog.Logger) *Server {
	s := &Server{machine: m, log: log}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.http = http.Server{
		Handler:           NewHandler(m, s.stop),
		ReadHeaderTimeout: headerTimeout,
		ReadTimeout:       readTimeout,
		WriteTimeout:      writeTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeaderBytes,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}
	return s
}

// Listen makes the unix socket at path, which only its user may open.
func Listen(path string) (net.Listener, error) {
	l, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	// Who takes the machine down removes the whole folder.
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// Serve accepts connections on l until [Server.Close]. It returns at once; the
// server owns l from now on.
func (s *Server) Serve(l net.Listener) {
	s.serving.Go(func() {
		if err := s.http.Serve(newLimitListener(l, maxConnections)); !errors.Is(err, http.ErrServerClosed) {
			s.log.Error("control socket failed", "err", err)
		}
	})
}

// stop starts stopping the machine, unless that has begun: then, without grace,
// it is killed.
func (s *Server) stop(grace time.Duration) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return
	}
	if s.stopping {
		if grace == 0 {
			s.machine.Kill()
		}
		return
	}
	s.stopping = true
	s.serving.Go(func() {
		if err := s.machine.Stop(s.ctx, grace); err != nil && s.ctx.Err() == nil {
			s.log.Error("stop failed", "err", err)
		}
		s.mu.Lock()
		s.stopping = false
		s.mu.Unlock()
	})
}

// closeGrace is how long requests that are being answered may still take.
const closeGrace = time.Second

// Close ends the listener and all connections, and joins every goroutine of the
// server. Requests in progress get a moment to be answered.
func (s *Server) Close() error {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.cancel()
	ctx, cancel := context.WithTimeout(context.Background(), closeGrace)
	defer cancel()
	err := s.http.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		err = s.http.Close()
	}
	s.serving.Wait()
	return err
}

// limitListener accepts a connection only when fewer than the limit are open.
type limitListener struct {
	net.Listener
	slots  chan struct{}
	closed chan struct{}
	once   sync.Once
}

func newLimitListener(l net.Listener, limit int) *limitListener {
	return &limitListener{Listener: l, slots: make(chan struct{}, limit), closed: make(chan struct{})}
}

// Accept waits for a free slot, then for a connection.
func (l *limitListener) Accept() (net.Conn, error) {
	select {
	case l.slots <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.slots
		return nil, err
	}
	return &limitedConn{Conn: c, slots: l.slots}, nil
}

// Close wakes Accept.
func (l *limitListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

// limitedConn gives its slot back when closed.
type limitedConn struct {
	net.Conn
	slots chan struct{}
	once  sync.Once
}

// Close closes the connection.
func (c *limitedConn) Close() error {
	c.once.Do(func() { <-c.slots })
	return c.Conn.Close()
}
