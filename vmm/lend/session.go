package lend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"sync"
)

// ErrGone is wrapped when the other end has closed the connection.
var ErrGone = errors.New("the other end is gone")

// Session is an operation that runs, seen by the machine. Its methods may be
// called from any goroutine until the operation returns.
type Session struct {
	conn  *conn
	kinds Kinds
	gone  chan struct{} // closed when nothing is received any more

	mu      sync.Mutex // guards what follows
	last    uint64
	given   []*os.File            // with the end
	waiting map[uint64]chan reply // nil where nobody waits any more
}

// reply is an answer on its way to who asked.
type reply struct {
	m     message
	files []*os.File
}

func newSession(c *conn, kinds Kinds) *Session {
	return &Session{conn: c, kinds: kinds, gone: make(chan struct{}), waiting: map[uint64]chan reply{}}
}

// maxWaiting bounds what is asked and not answered.
const maxWaiting = 64

// Ask asks the client for something and returns the files that it lends, which
// are exactly n and the caller's to check and to close. What the client says
// besides is decoded into out, unless that is nil. It waits until there is an
// answer, ctx ends or the client is gone ([ErrGone]).
func (s *Session) Ask(ctx context.Context, what string, args, out any, n int) ([]*os.File, error) {
	r, err := s.ask(ctx, what, args)
	if err != nil {
		return nil, fmt.Errorf("ask for %s: %w", what, err)
	}
	if r.m.Failure != nil {
		return nil, s.kinds.unpack(r.m.Failure)
	}
	if len(r.files) != n {
		err = fmt.Errorf("%w: %d descriptors instead of %d", ErrProtocol, len(r.files), n)
	}
	if err == nil && out != nil {
		if err = json.Unmarshal(r.m.Body, out); err != nil {
			err = fmt.Errorf("%w: %w", ErrProtocol, err)
		}
	}
	if err != nil {
		closeAll(r.files)
		return nil, fmt.Errorf("answer to %s: %w", what, err)
	}
	return r.files, nil
}

func (s *Session) ask(ctx context.Context, what string, args any) (reply, error) {
	if err := ctx.Err(); err != nil {
		return reply{}, context.Cause(ctx)
	}
	m, err := newMessage(kindAsk, args)
	if err != nil {
		return reply{}, err
	}
	answer := make(chan reply, 1)
	if m.ID, err = s.expect(answer); err != nil {
		return reply{}, err
	}
	m.Name = what
	if err := s.conn.write(m); err != nil {
		s.forget(m.ID)
		return reply{}, fmt.Errorf("%w: %w", ErrGone, err)
	}
	select {
	case r := <-answer:
		return r, nil
	case <-ctx.Done():
		err = context.Cause(ctx)
	case <-s.gone:
		err = ErrGone
	}
	s.giveUp(m.ID)
	select {
	case r := <-answer: // it came in between
		closeAll(r.files)
	default:
	}
	return reply{}, err
}

// expect registers who waits for an answer, and returns its number.
func (s *Session) expect(answer chan reply) (uint64, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.waiting) >= maxWaiting {
		return 0, fmt.Errorf("%d questions are not answered", maxWaiting)
	}
	s.last++
	s.waiting[s.last] = answer
	return s.last, nil
}

// Give gives the client files with the end of the operation, if that succeeds.
// They are closed then.
func (s *Session) Give(files ...*os.File) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.given = append(s.given, files...)
}

// forget says that there will be no answer.
func (s *Session) forget(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.waiting, id)
}

// giveUp says that nobody waits for an answer that may still come.
func (s *Session) giveUp(id uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, ok := s.waiting[id]; ok {
		s.waiting[id] = nil
	}
}

// Tell tells the client how far the operation is. It never waits: a client that
// does not listen misses it.
func (s *Session) Tell(event any) {
	if m, err := newMessage(kindEvent, event); err == nil {
		s.conn.offer(m)
	}
}

// receive takes what the client sends until it is gone, and then cancels.
func (s *Session) receive(cancel context.CancelCauseFunc) {
	defer close(s.gone)
	for {
		m, files, err := s.conn.read()
		if err == nil {
			err = s.take(m, files, cancel)
		}
		if err != nil {
			cancel(fmt.Errorf("%w: %w", ErrGone, err))
			return
		}
	}
}

// take deals with one message.
func (s *Session) take(m message, files []*os.File, cancel context.CancelCauseFunc) error {
	switch m.Kind {
	case kindCancel:
		cancel(context.Canceled)
		return nil
	case kindAnswer:
		s.mu.Lock()
		defer s.mu.Unlock()
		answer, asked := s.waiting[m.ID]
		delete(s.waiting, m.ID)
		switch {
		case !asked:
			closeAll(files)
			return fmt.Errorf("%w: an answer to nothing", ErrProtocol)
		case answer == nil:
			closeAll(files)
		default:
			answer <- reply{m, files} // it has room, and each gets one
		}
		return nil
	}
	closeAll(files)
	return fmt.Errorf("%w: %s is not for a client to say", ErrProtocol, m.Kind)
}
