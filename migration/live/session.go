package live

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/migration/wire"
)

// session is what both sides have: connections, a reader of the control
// connection, signs of life, and one error that ends it all.
//
//	control reader --> inbox --> the state machine (one goroutine)
//	      |                            |
//	      +-- end(err) --> run ends <--+-- links are woken
type session struct {
	run    context.Context
	cancel context.CancelCauseFunc
	flow   flow
	token  Token

	control *link
	inbox   chan wire.Message
	read    chan struct{} // closed when the control reader is gone
	wg      sync.WaitGroup

	mu    sync.Mutex
	links []*link // all of them
	woken bool

	stall time.Duration // after how long a silent peer counts as gone
	tick  atomic.Int64  // how often to give signs of life, nanoseconds
	// stopped: the guest stands still, patience is shorter.
	stopped atomic.Bool
	// waiting: this side waits for the other, which must get on.
	waiting  atomic.Int32
	done     atomic.Uint64 // bytes of memory that this side has dealt with
	peerDone atomic.Uint64 // what the other side says of that
}

func newSession(ctx context.Context, stall time.Duration) *session {
	s := &session{inbox: make(chan wire.Message, 16), read: make(chan struct{}), stall: stall}
	s.run, s.cancel = context.WithCancelCause(ctx)
	s.flow.heard.Store(time.Now().UnixNano())
	s.setTick(stall)
	context.AfterFunc(s.run, s.wakeAll)
	return s
}

// setTick chooses how often to give signs of life to a peer of some patience.
func (s *session) setTick(stall time.Duration) {
	s.tick.Store(int64(min(max(stall/20, 5*time.Millisecond), time.Second)))
}

// add takes a link into the session.
func (s *session) add(l *link) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.links = append(s.links, l)
	if s.woken {
		l.wake(l == s.control)
	}
}

func (s *session) wakeAll() {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.woken = true
	for _, l := range s.links {
		l.wake(l == s.control)
	}
}

// end ends the session with its first error.
func (s *session) end(err error) { s.cancel(err) }

// cause returns why the session ended. An error of a connection may come before
// the word of the peer that explains it, so that one is waited for.
func (s *session) cause(err error) error {
	var gone *LostError
	if s.run.Err() == nil && errors.As(err, &gone) {
		select {
		case <-s.run.Done():
		case <-time.After(partingLimit):
		}
	}
	if s.run.Err() != nil {
		return context.Cause(s.run)
	}
	return err
}

// start begins to give signs of life, to look for the peer's, and to read the
// control connection: decode returns the message of a frame, or nil when there is
// nothing to do.
func (s *session) start(decode func(wire.Frame) (wire.Message, error)) {
	s.wg.Go(s.giveSigns)
	s.wg.Go(s.watch)
	s.wg.Go(func() {
		defer close(s.read)
		s.end(s.readControl(decode))
	})
}

// finish ends what start began. The links stay.
func (s *session) finish(err error) {
	s.end(err)
	s.wg.Wait()
}

func (s *session) readControl(decode func(wire.Frame) (wire.Message, error)) error {
	for {
		f, err := s.control.in.Next()
		if err != nil {
			return lost(err)
		}
		m, err := decode(f)
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case nil:
		case *wire.Alive:
			s.peerDone.Store(m.Done)
		case *wire.Fail:
			return &PeerError{Refused: m.Refused, Reason: m.Reason}
		default:
			select {
			case s.inbox <- m:
			case <-s.run.Done():
				return context.Cause(s.run)
			}
		}
	}
}

// next returns the next message. What came before the session ended is returned
// first.
func (s *session) next() (wire.Message, error) {
	select {
	case m := <-s.inbox:
		return m, nil
	case <-s.run.Done():
	}
	select {
	case m := <-s.inbox:
		return m, nil
	default:
		return nil, context.Cause(s.run)
	}
}

// expect returns the next message, which is to be of M's type.
func expect[M wire.Message](s *session) (M, error) {
	s.waiting.Add(1)
	defer s.waiting.Add(-1)
	return expectLong[M](s)
}

// expectLong is expect for what may take as long as it likes, while the peer
// gives signs of life.
func expectLong[M wire.Message](s *session) (M, error) {
	var none M
	m, err := s.next()
	if err != nil {
		return none, err
	}
	want, ok := m.(M)
	if !ok {
		return none, fmt.Errorf("the other side sent %q where %q was expected", m.Type(), none.Type())
	}
	return want, nil
}

// say sends a message on the control connection.
func (s *session) say(m wire.Message) error {
	if _, err := s.control.send(m); err != nil {
		return s.cause(lost(err))
	}
	return nil
}

// giveSigns gives signs of life until the session ends.
func (s *session) giveSigns() {
	for {
		select {
		case <-s.run.Done():
			return
		case <-time.After(time.Duration(s.tick.Load())):
		}
		// An error ends the reader too, which knows more.
		_ = s.control.trySend(&wire.Alive{Done: s.done.Load()})
	}
}

// watch ends the session when the peer gives no sign of life, or does not get on
// with what is waited for.
func (s *session) watch() {
	moved, since := uint64(0), time.Now()
	for {
		select {
		case <-s.run.Done():
			return
		case <-time.After(time.Duration(s.tick.Load())):
		}
		patience := s.stall
		if s.stopped.Load() {
			patience /= 3
		}
		if silent := time.Since(time.Unix(0, s.flow.heard.Load())); silent > patience {
			s.end(fmt.Errorf("nothing was heard of the other side for %s", silent.Round(time.Millisecond)))
			return
		}
		if now := s.peerDone.Load() + s.flow.out.Load(); now != moved || s.waiting.Load() == 0 {
			moved, since = now, time.Now()
		} else if time.Since(since) > s.stall {
			s.end(fmt.Errorf("the other side lives, but got no further for %s", s.stall))
			return
		}
	}
}
