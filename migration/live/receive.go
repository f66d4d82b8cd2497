package live

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"ditto.vm/migration/wire"
)

// maxGreetings bounds connections that have not said what they are.
const maxGreetings = 16

// Receive receives one VM. It returns when the guest runs, or when a migration
// that began has failed: then nothing of it has run and nothing is left.
// Connections that are none of a source cost little and change nothing.
func Receive(ctx context.Context, vm DestinationVM, accept Accepter, o ReceiveOptions) (Result, error) {
	if o.Stall <= 0 {
		o.Stall = 30 * time.Second
	}
	if o.HelloLimit <= 0 {
		o.HelloLimit = 5 * time.Second
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	d := &door{o: o, accept: accept, sources: make(chan *receiver), greetings: make(chan struct{}, maxGreetings)}
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	wg.Go(func() {
		if err := d.open(ctx, &wg); err != nil {
			d.close(cancel, err)
		}
	})
	for {
		select {
		case r := <-d.sources:
			began, err := r.receive(ctx, vm)
			if began || ctx.Err() != nil {
				return r.result, err
			}
			o.Log.Warn("a source did not get as far as to offer a VM", "err", err)
			if err := d.leave(r); err != nil {
				return Result{}, err
			}
		case <-ctx.Done():
			return Result{}, context.Cause(ctx)
		}
	}
}

// door lets connections in: it reads what each is for and hands it to whom it
// concerns.
type door struct {
	o         ReceiveOptions
	accept    Accepter
	sources   chan *receiver
	greetings chan struct{} // one for each connection that has not said what it is

	mu   sync.Mutex
	busy *receiver // the migration that is under way
	err  error     // why nobody comes any more
}

// open accepts until the context ends.
func (d *door) open(ctx context.Context, wg *sync.WaitGroup) error {
	for {
		select {
		case d.greetings <- struct{}{}:
		case <-ctx.Done():
			return nil
		}
		conn, err := d.accept(ctx)
		if ctx.Err() != nil {
			if conn != nil {
				_ = conn.Close()
			}
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept connections: %w", err)
		}
		wg.Go(func() {
			defer func() { <-d.greetings }()
			if err := d.greet(ctx, conn); err != nil {
				d.o.Log.Info("a connection was closed", "peer", conn.RemoteAddr(), "err", err)
				_ = conn.Close()
			}
		})
	}
}

// greet reads what a connection is for, within the limit of time, and hands it
// over. With an error the caller closes it.
func (d *door) greet(ctx context.Context, conn net.Conn) error {
	if err := conn.SetDeadline(time.Now().Add(d.o.HelloLimit)); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	p, err := wire.ReadPreamble(conn)
	if err != nil {
		return err
	}
	version, err := p.Choose(wire.MinVersion, wire.Version)
	if err != nil {
		return errors.Join(err, welcome(conn, wire.StatusVersion, 0))
	}
	switch p.Role {
	case wire.RoleControl:
		return d.newSource(ctx, conn, p, version)
	case wire.RoleData:
		return d.moreData(conn, p, version)
	case wire.RoleOutcome:
		if err := welcome(conn, wire.StatusOK, version); err != nil {
			return err
		}
		_, err := conn.Write(wire.Append(nil, &wire.Answer{Outcome: d.outcome(p.Token)}))
		return errors.Join(err, conn.Close())
	default:
		return d.comeAgain(conn, p, version)
	}
}

// comeAgain hands a connection to the post-copy that it goes on with.
func (d *door) comeAgain(conn net.Conn, p wire.Preamble, version uint16) error {
	d.mu.Lock()
	r := d.busy
	d.mu.Unlock()
	if r == nil || r.id != p.Token || r.pulling.Load() == nil || r.outcome() != OutcomeCommitted {
		return errors.Join(errors.New("a source came again from which nothing is missing"), welcome(conn, wire.StatusUnknown, 0))
	}
	if err := welcome(conn, wire.StatusOK, version); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	r.current.Load().end(errors.New("the source connected again"))
	select {
	case r.again <- conn:
		return nil
	default:
		return errors.New("a source came twice")
	}
}

// welcome answers a preamble.
func welcome(conn net.Conn, status wire.Status, version uint16) error {
	w := wire.Welcome{Min: wire.MinVersion, Max: wire.Version, Chosen: version, Status: status}
	_, err := conn.Write(w.Append(nil))
	return err
}

// newSource lets a source in, if none is here.
func (d *door) newSource(ctx context.Context, conn net.Conn, p wire.Preamble, version uint16) error {
	d.mu.Lock()
	free := d.busy == nil
	var r *receiver
	if free {
		r = newReceiver(ctx, conn, p.Token, d.o)
		d.busy = r
	}
	d.mu.Unlock()
	if !free {
		return errors.Join(errors.New("a second source"), welcome(conn, wire.StatusBusy, 0))
	}
	err := welcome(conn, wire.StatusOK, version)
	if err == nil {
		err = conn.SetDeadline(time.Now().Add(d.o.HelloLimit))
	}
	if err == nil {
		select {
		case d.sources <- r:
			return nil
		case <-ctx.Done():
			err = context.Cause(ctx)
		}
	}
	r.end(err)
	return errors.Join(err, d.leave(r))
}

// close says that no more connections come. A migration that is under way does
// without, others are not waited for.
func (d *door) close(cancel context.CancelCauseFunc, err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.err = err; d.busy == nil {
		cancel(err)
	}
}

// leave lets the next source in, and returns an error if none can come.
func (d *door) leave(r *receiver) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.busy == r {
		d.busy = nil
	}
	return d.err
}

// moreData hands a data connection to its migration.
func (d *door) moreData(conn net.Conn, p wire.Preamble, version uint16) error {
	d.mu.Lock()
	r := d.busy
	d.mu.Unlock()
	if r == nil || r.id != p.Token || !r.reserve(p.Index) {
		return errors.Join(errors.New("a data connection that nobody expects"), welcome(conn, wire.StatusUnknown, 0))
	}
	if err := welcome(conn, wire.StatusOK, version); err != nil {
		return err
	}
	if err := conn.SetDeadline(time.Time{}); err != nil {
		return err
	}
	return r.addData(conn)
}

// outcome tells what became of a migration.
func (d *door) outcome(token Token) Outcome {
	d.mu.Lock()
	r := d.busy
	d.mu.Unlock()
	switch {
	case r != nil && r.id == token:
		return r.outcome()
	case d.o.Outcome != nil:
		return d.o.Outcome(token)
	}
	return OutcomeUnknown
}

// AnswerOutcome serves a connection of which nothing is expected but the question
// what became of a migration, within a limit of time. Others are told that nobody
// receives here. It closes the connection.
func AnswerOutcome(conn net.Conn, limit time.Duration, lookup func(Token) Outcome) error {
	defer func() { _ = conn.Close() }()
	if err := conn.SetDeadline(time.Now().Add(limit)); err != nil {
		return err
	}
	p, err := wire.ReadPreamble(conn)
	if err != nil {
		return err
	}
	version, err := p.Choose(wire.MinVersion, wire.Version)
	if err != nil {
		return errors.Join(err, welcome(conn, wire.StatusVersion, 0))
	}
	if p.Role != wire.RoleOutcome {
		return errors.Join(errors.New("a source came while nobody receives"), welcome(conn, wire.StatusNoReceive, 0))
	}
	if err := welcome(conn, wire.StatusOK, version); err != nil {
		return err
	}
	_, err = conn.Write(wire.Append(nil, &wire.Answer{Outcome: lookup(p.Token)}))
	return err
}

// AcceptFrom accepts from a listener that has deadlines, as those of TCP and unix
// sockets do.
func AcceptFrom(l net.Listener) Accepter {
	return func(ctx context.Context) (net.Conn, error) {
		deadline, ok := l.(interface{ SetDeadline(time.Time) error })
		if !ok {
			return nil, fmt.Errorf("a %T cannot be waited for with a limit", l)
		}
		if err := deadline.SetDeadline(time.Time{}); err != nil {
			return nil, err
		}
		stop := context.AfterFunc(ctx, func() { _ = deadline.SetDeadline(time.Unix(1, 0)) })
		defer stop()
		return l.Accept()
	}
}
