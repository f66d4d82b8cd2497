package live

import (
	"context"
	"errors"
	"net"
	"time"
)

// Receive receives one VM. It returns when the guest runs, or when a migration
// that began has failed: then nothing of it has run and nothing is left.
// Connections that are none of a source cost little and change nothing.
func Receive(ctx context.Context, vm DestinationVM, accept Accepter, o ReceiveOptions) (Result, error) {
	return Result{}, errors.ErrUnsupported
}

// AnswerOutcome serves a connection of which nothing is expected but the question
// what became of a migration, within a limit of time. Others are told that nobody
// receives here. It closes the connection.
func AnswerOutcome(conn net.Conn, limit time.Duration, lookup func(Token) Outcome) error {
	return errors.ErrUnsupported
}

// AcceptFrom accepts from a listener that has deadlines, as those of TCP and unix
// sockets do.
func AcceptFrom(l net.Listener) Accepter {
	return func(ctx context.Context) (net.Conn, error) { return nil, errors.ErrUnsupported }
}
