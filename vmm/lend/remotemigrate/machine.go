package remotemigrate

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/vmm/lend"
)

// Mover is a machine that can be moved: a [Departure].
type Mover interface {
	// Migrate sends the machine to where dial leads. dial is told whether it is
	// for the outcome of a migration that was committed.
	Migrate(ctx context.Context, dial func(ctx context.Context, again bool) (net.Conn, error), o live.Options) (live.Report, error)
}

// Operations are what a machine's process does for clients, by their names.
func Operations(m Mover) map[string]lend.Operation {
	return map[string]lend.Operation{operation: migrate(m)}
}

// migrate is the operation.
func migrate(m Mover) lend.Operation {
	return func(ctx context.Context, s *lend.Session, body json.RawMessage) (any, error) {
		var o Options
		if err := json.Unmarshal(body, &o); err != nil {
			return nil, fmt.Errorf("migrate: %w: %w", lend.ErrProtocol, err)
		}
		if err := o.Check(); err != nil {
			return nil, fmt.Errorf("migrate: %w", err)
		}
		d, err := newDialer(s, o.TLS)
		if err != nil {
			return nil, fmt.Errorf("migrate: %w", err)
		}
		how := o.live()
		how.Events = func(e live.Event) { s.Tell(e) }
		report, err := m.Migrate(ctx, d.dial, how)
		if err != nil {
			return nil, mark(err)
		}
		return report, nil
	}
}

// marked is an error and what it is on the other end.
type marked struct {
	error
	kind error
}

// Unwrap returns both.
func (m marked) Unwrap() []error { return []error{m.error, m.kind} }

// mark says which of the errors of [Kinds] an error of a migration is.
func mark(err error) error {
	var doubt *live.InDoubtError
	var stuck *live.StuckError
	var peer *live.PeerError
	switch {
	case errors.As(err, &doubt):
		return marked{err, ErrInDoubt}
	case errors.As(err, &stuck):
		return marked{err, ErrStuck}
	case errors.As(err, &peer) && peer.Refused:
		return marked{err, ErrRefused}
	}
	return err
}

// dialer makes connections of what a client lends.
type dialer struct {
	session *lend.Session
	tls     *tls.Config // nil for none
}

func newDialer(s *lend.Session, t *TLS) (*dialer, error) {
	if t == nil {
		return &dialer{session: s}, nil
	}
	config, err := t.Client(t.Name)
	return &dialer{s, config}, err
}

// handshakeLimit bounds a TLS handshake.
const handshakeLimit = 10 * time.Second

// dial has the client make a connection, and speaks TLS on it.
func (d *dialer) dial(ctx context.Context, again bool) (net.Conn, error) {
	files, err := d.session.Ask(ctx, askConnect, connectArgs{again}, nil, 1)
	if err != nil {
		return nil, err
	}
	raw, err := lentConn(files[0])
	if err != nil || d.tls == nil {
		return raw, err
	}
	ctx, cancel := context.WithTimeout(ctx, handshakeLimit)
	defer cancel()
	c := pki.Client(raw, d.tls)
	if err := c.HandshakeContext(ctx); err != nil {
		_ = raw.Close() // the error is what counts
		return nil, pki.Handshake(err)
	}
	return c, nil
}

// lentConn makes a connection of a socket that was lent.
func lentConn(f *os.File) (net.Conn, error) {
	defer func() { _ = f.Close() }() // the connection has its own
	if err := lend.CheckStream(f); err != nil {
		return nil, err
	}
	c, err := net.FileConn(f)
	if err != nil {
		return nil, fmt.Errorf("the socket that was lent: %w", err)
	}
	return c, nil
}
