package live

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// redialInterval is how often a source connects again whose guest waits for pages.
const redialInterval = 500 * time.Millisecond

// sendMissing says which pages come after the commit.
func (s *sender) sendMissing() error {
	if err := s.beginRound(0, true); err != nil {
		return err
	}
	if err := s.sendBarriers(); err != nil {
		return err
	}
	frame, n := wire.Begin(nil), 0
	send := func() error {
		if n == 0 {
			return nil
		}
		s.control.mu.Lock()
		defer s.control.mu.Unlock()
		n = 0
		return s.control.write(wire.Finish(frame, 0, wire.TypeMissing, 0, 0))
	}
	for r := range s.dirty.Runs() {
		frame = wire.AppendRun(frame, wire.Run{GFN: uint64(r.Start.GFN()), Count: uint32(r.Size >> memory.PageShift)})
		if n++; n == wire.MaxRuns {
			if err := send(); err != nil {
				return s.cause(lost(err))
			}
			frame = wire.Begin(frame[:0])
		}
	}
	if err := send(); err != nil {
		return s.cause(lost(err))
	}
	return nil
}

// request queues pages that the destination asks for.
func (s *sender) request(f wire.Frame) error {
	m, err := wire.ParseRequest(f)
	if err != nil {
		return err
	}
	if m.Pages > batchPages {
		return fmt.Errorf("the destination asked for %d pages at once", m.Pages)
	}
	batch := make([]memory.Range, 0, m.Runs.Len())
	for i := range m.Runs.Len() {
		r, err := rangeOf(s.mem, m.Runs.At(i))
		if err != nil {
			return fmt.Errorf("the destination asked for pages: %w", err)
		}
		batch = append(batch, r)
	}
	select {
	case s.requests <- batch:
		return nil
	case <-s.run.Done():
		return context.Cause(s.run)
	}
}

// errEndedEarly: what the guest at the destination lacks is nowhere any more.
var errEndedEarly = errors.New("the source was ended before the destination had all of the guest's memory")

// pull serves pages until the destination has them all. The guest runs there, so
// that nothing ends this but the destination, or who ends the VM here: connections
// are made again.
func (s *sender) pull(connected bool) error {
	s.phase(PhasePull)
	began := time.Now()
	defer func() { s.report.Pull = time.Since(began) }()
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	ended := s.vm.Committed()
	go func() {
		select {
		case <-ended:
			cancel(errEndedEarly)
		case <-ctx.Done():
		}
	}()
	for {
		if connected {
			err := s.servePages(ctx)
			if err == nil {
				return nil
			}
			_ = s.control.conn.Close()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			s.events.tell(true, s.sent(), func(e *Event) { e.Error = "the guest there waits for pages; connecting again: " + err.Error() })
			s.o.Log.Warn("the guest waits for pages; connecting again", "vm", s.offer.Name, "err", err)
		}
		if err := s.redial(ctx); err != nil {
			return err
		}
		connected = true
		s.events.tell(true, s.sent(), func(e *Event) { e.Error = "" })
	}
}

// servePages sends what is asked for, until nothing is missing or the connection
// ends.
func (s *sender) servePages(ctx context.Context) error {
	serving := s.session
	stop := context.AfterFunc(ctx, func() { serving.end(context.Cause(ctx)) })
	defer stop()
	s.stopped.Store(false)
	s.makeWorkers()
	var wg sync.WaitGroup
	for _, w := range s.workers {
		wg.Go(func() {
			for {
				select {
				case batch := <-s.requests:
					if err := w.send(s.run, batch, false); err != nil {
						s.end(err)
						return
					}
				case <-s.run.Done():
					return
				}
			}
		})
	}
	_, err := expectLong[*wire.Pulled](s.session)
	s.finish(err)
	wg.Wait()
	for len(s.requests) > 0 { // they are asked again
		<-s.requests
	}
	return err
}

// redial connects until it succeeds, the destination says that it needs no pages,
// or the context ends.
func (s *sender) redial(ctx context.Context) error {
	for {
		conn, err := greet(ctx, s.dial, wire.Preamble{Role: wire.RolePull, Token: s.token}, s.o.Stall)
		var refused *PeerError
		if errors.As(err, &refused) {
			return fmt.Errorf("the destination did not say that it has all of memory, and wants no more: look whether the VM runs there: %w", err)
		}
		if err == nil {
			session := newSession(context.Background(), s.o.Stall)
			session.token, session.control = s.token, newLink(conn, &session.flow)
			session.setTick(time.Duration(s.tick.Load()) * 20)
			session.flow.out.Store(s.flow.out.Load())
			session.flow.in.Store(s.flow.in.Load())
			session.add(session.control)
			s.session, s.data, s.workers = session, []*link{session.control}, nil
			s.start(s.decode)
			return nil
		}
		select {
		case <-time.After(redialInterval):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}
