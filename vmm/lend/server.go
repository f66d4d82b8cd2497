package lend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"
)

// Operation is what a connection is for. It gets what the client chose and
// returns what the client is told at the end. ctx ends when the client cancels
// or is gone, and when the machine ends; what it has to undo it still can ask
// for, with a context of its own.
type Operation func(ctx context.Context, s *Session, options json.RawMessage) (result any, err error)

// ErrEnding cancels operations of a machine that ends.
var ErrEnding = errors.New("the machine is ending")

// Limits of a server.
const (
	maxConnections = 8
	helloTimeout   = 10 * time.Second
	// closeGrace is what an operation gets that is about to end by itself: one
	// that ends the machine, for example.
	closeGrace = 2 * time.Second
	// undoGrace is what a canceled operation gets to undo what it did.
	undoGrace = 10 * time.Second
)

// Server runs the operations of one machine.
type Server struct {
	operations map[string]Operation
	kinds      Kinds
	log        *slog.Logger

	ctx     context.Context // of all operations
	cancel  context.CancelCauseFunc
	running sync.WaitGroup // the listener and the connections
	closing chan struct{}  // closed when Close begins
	ended   chan struct{}  // closed when the last is joined
	slots   chan struct{}  // has an entry for each connection
	once    sync.Once      // closes

	mu       sync.Mutex // guards what follows
	listener *net.UnixListener
	conns    map[*conn]struct{}
}

// NewServer returns a server that does not listen yet.
func NewServer(operations map[string]Operation, kinds Kinds, log *slog.Logger) *Server {
	s := &Server{
		operations: operations, kinds: kinds, log: log, conns: map[*conn]struct{}{},
		closing: make(chan struct{}), ended: make(chan struct{}), slots: make(chan struct{}, maxConnections),
	}
	s.ctx, s.cancel = context.WithCancelCause(context.Background())
	return s
}

// Serve accepts connections until [Server.Close]. It returns at once; the server
// owns the listener from now on.
func (s *Server) Serve(l *net.UnixListener) {
	s.mu.Lock()
	s.listener = l
	s.mu.Unlock()
	s.running.Go(func() {
		for s.acceptOne(l) {
		}
	})
}

// acceptOne waits for room and a connection, and serves it. It returns false
// when the server closes.
func (s *Server) acceptOne(l *net.UnixListener) bool {
	select {
	case s.slots <- struct{}{}:
	case <-s.closing:
		return false
	}
	accepted, err := l.AcceptUnix()
	if err != nil {
		if !errors.Is(err, net.ErrClosed) {
			s.log.Error("socket for operations failed", "err", err)
		}
		return false
	}
	c := newConn(accepted)
	s.mu.Lock()
	s.conns[c] = struct{}{}
	s.mu.Unlock()
	s.running.Go(func() {
		s.serve(c)
		_ = c.Close()
		s.mu.Lock()
		delete(s.conns, c)
		s.mu.Unlock()
		<-s.slots
	})
	return true
}

// serve runs one operation.
func (s *Server) serve(c *conn) {
	hello, err := readHello(c)
	if err != nil {
		s.log.Warn("a connection for an operation was of no use", "err", err)
		if !errors.Is(err, net.ErrClosed) {
			c.offer(message{Kind: kindEnd, Failure: s.kinds.pack(err)})
		}
		return
	}
	session := newSession(c, s.kinds)
	ctx, cancel := context.WithCancelCause(s.ctx)
	defer cancel(nil)
	go session.receive(cancel)

	var result any
	run, ok := s.operations[hello.Name]
	if ok {
		result, err = run(ctx, session, hello.Body)
	} else {
		err = fmt.Errorf("the machine's process does not know the operation %s: use the ditto that it was started with", hello.Name)
	}
	files := session.given
	defer closeAll(files)
	end, failed := newMessage(kindEnd, result)
	if err = errors.Join(err, failed); err == nil && len(files) > MaxFiles {
		err = fmt.Errorf("%d files to give are more than %d", len(files), MaxFiles)
	}
	if err != nil {
		end, files = message{Kind: kindEnd, Failure: s.kinds.pack(err)}, nil
	}
	if err := c.write(end, files...); err != nil {
		s.log.Warn("the end of an operation was not heard", "op", hello.Name, "err", err)
	}
	// The client closes when it has read the end; what is closed here first
	// would still be read.
	_ = c.CloseWrite()
	_ = c.SetReadDeadline(time.Now().Add(helloTimeout))
	<-session.gone
}

// readHello reads what a connection is for.
func readHello(c *conn) (message, error) {
	if err := c.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return message{}, err
	}
	m, files, err := c.read()
	closeAll(files)
	if err == nil && m.Kind != kindHello {
		err = fmt.Errorf("%w: it begins with %s", ErrProtocol, m.Kind)
	}
	if err != nil {
		return message{}, err
	}
	return m, c.SetReadDeadline(time.Time{})
}

// Close lets no more operations begin, cancels those that do not end by
// themselves, and joins all of them. A second Close does nothing.
func (s *Server) Close() (err error) {
	s.once.Do(func() { err = s.shutdown() })
	return err
}

func (s *Server) shutdown() (err error) {
	close(s.closing)
	s.mu.Lock()
	if s.listener != nil {
		err = s.listener.Close()
	}
	s.mu.Unlock()
	go func() {
		s.running.Wait()
		close(s.ended)
	}()
	if !s.endsWithin(closeGrace) {
		s.cancel(ErrEnding)
		if !s.endsWithin(undoGrace) {
			s.log.Warn("an operation was cut off: its client does not answer")
			s.drop()
		}
	}
	<-s.ended
	s.cancel(ErrEnding)
	return err
}

// endsWithin reports whether all operations end in time.
func (s *Server) endsWithin(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-s.ended:
		return true
	case <-timer.C:
		return false
	}
}

// drop closes all connections.
func (s *Server) drop() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		_ = c.Close()
	}
}
