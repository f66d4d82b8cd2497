package lend

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"
)

// Client takes part in an operation.
type Client struct {
	Kinds Kinds
	// Answer does what the machine asks for and returns what to say and which
	// files to lend; they are closed when they are sent. It is called by one
	// goroutine at a time. ctx is that of Call.
	Answer func(ctx context.Context, what string, args json.RawMessage) (reply any, files []*os.File, err error)
	// Event hears how far the operation is, if not nil.
	Event func(event json.RawMessage)
	// Given gets the files that come with the end of an operation that succeeded,
	// to check and to close; nil wants none.
	Given func(files []*os.File)
	// Grace is how long the machine may take to end after it was told to cancel;
	// a minute for 0.
	Grace time.Duration
}

// cancelGrace is what a machine gets to undo an operation that was canceled.
const cancelGrace = time.Minute

// Call runs an operation of the machine whose socket is at path, and decodes its
// result. When ctx ends the operation is canceled, and undone before Call
// returns. A machine that ended meanwhile is [ErrGone].
func (c Client) Call(ctx context.Context, path, operation string, options, result any) error {
	socket, err := net.DialUnix(network, nil, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		return fmt.Errorf("the machine cannot be reached: %w", err)
	}
	conn := newConn(socket)
	defer conn.Close()
	hello, err := newMessage(kindHello, options)
	if err != nil {
		return err
	}
	hello.Version, hello.Name = Version, operation
	if err := conn.write(hello); err != nil {
		return fmt.Errorf("%s: %w: %w", operation, ErrGone, err)
	}
	grace := c.Grace
	if grace == 0 {
		grace = cancelGrace
	}
	canceled := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(canceled)
		_ = conn.write(message{Kind: kindCancel}) // or else it is gone anyway
		_ = conn.SetReadDeadline(time.Now().Add(grace))
	})
	end, err := c.follow(ctx, conn)
	if !stop() {
		<-canceled
	}
	switch {
	case err != nil:
		return errors.Join(fmt.Errorf("%s: %w", operation, err), ctx.Err())
	case end.Failure != nil:
		return c.Kinds.unpack(end.Failure)
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(end.Body, result); err != nil {
		return fmt.Errorf("%s: %w: %w", operation, ErrProtocol, err)
	}
	return nil
}

// follow does what the machine asks for until the operation ends.
func (c Client) follow(ctx context.Context, conn *conn) (end message, err error) {
	for {
		m, files, err := conn.read()
		if err != nil {
			return end, fmt.Errorf("%w: %w", ErrGone, err)
		}
		if c.Given != nil && m.Kind == kindEnd && m.Failure == nil {
			c.Given(files)
			return m, nil
		}
		closeAll(files) // nobody wants them
		switch m.Kind {
		case kindAsk:
			if err := c.answer(ctx, conn, m); err != nil {
				return end, err
			}
		case kindEvent:
			if c.Event != nil {
				c.Event(m.Body)
			}
		case kindEnd:
			return m, nil
		default:
			return end, fmt.Errorf("%w: %s is not for a machine to say", ErrProtocol, m.Kind)
		}
	}
}

// answer does one thing.
func (c Client) answer(ctx context.Context, conn *conn, asked message) error {
	body, files, err := c.Answer(ctx, asked.Name, asked.Body)
	defer closeAll(files)
	m, failed := newMessage(kindAnswer, body)
	if err = errors.Join(err, failed); err == nil && len(files) > MaxFiles {
		err = fmt.Errorf("%d files to lend are more than %d", len(files), MaxFiles)
	}
	m.ID = asked.ID
	if err != nil {
		m.Body, m.Failure = nil, c.Kinds.pack(err)
		return c.send(conn, m, nil)
	}
	return c.send(conn, m, files)
}

func (c Client) send(conn *conn, m message, files []*os.File) error {
	if err := conn.write(m, files...); err != nil {
		return fmt.Errorf("%w: %w", ErrGone, err)
	}
	return nil
}
