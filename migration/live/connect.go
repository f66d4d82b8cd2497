package live

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"ditto.vm/migration/wire"
)

// greet dials and says what the connection is for. The answer is awaited as long
// as the limit says.
func greet(ctx context.Context, dial Dialer, p wire.Preamble, limit time.Duration) (net.Conn, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("the other side did not answer within %s", limit))
	defer cancel()
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	p.Min, p.Max = wire.MinVersion, wire.Version
	if err := exchange(conn, p); err != nil {
		_ = conn.Close()
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return nil, err
	}
	if !stop() {
		_ = conn.Close()
		return nil, context.Cause(ctx)
	}
	return conn, nil
}

// exchange sends the preamble and reads the answer.
func exchange(conn net.Conn, p wire.Preamble) error {
	if _, err := conn.Write(p.Append(nil)); err != nil {
		return lost(err)
	}
	if _, err := wire.ReadWelcome(conn, p.Min, p.Max); err != nil {
		return lostOrRefused(err)
	}
	return nil
}

// lostOrRefused tells apart a connection that ended from an answer.
func lostOrRefused(err error) error {
	var status *wire.StatusError
	switch {
	case errors.As(err, &status):
		return &PeerError{Refused: true, Reason: status.Status.String()}
	case errors.Is(err, wire.ErrNotDitto) || errors.Is(err, wire.ErrVersion):
		return err
	}
	return lost(err)
}
