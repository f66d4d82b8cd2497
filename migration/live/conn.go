package live

import (
	"errors"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/migration/wire"
)

// link is one connection of a migration.
type link struct {
	conn net.Conn
	in   *wire.Reader // for one goroutine
	// vectors says that slices can be sent together, gather how if it is not writev.
	vectors bool
	gather  gatherer
	flow    *flow

	mu  sync.Mutex // held while a frame is written
	buf []byte     // of messages
}

// flow counts what all connections of a migration carry, and when something was
// heard of the peer.
type flow struct {
	in, out atomic.Uint64 // bytes
	heard   atomic.Int64  // nanoseconds since 1970
}

// gatherer is a connection that sends slices together. They may be guest memory,
// which changes meanwhile.
type gatherer interface {
	WriteBuffers(*net.Buffers) (int64, error)
}

func newLink(conn net.Conn, f *flow) *link {
	l := &link{conn: conn, flow: f}
	switch c := conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		l.vectors = true
	case gatherer:
		l.vectors, l.gather = true, c
	}
	l.in = wire.NewReader(hearing{conn, f})
	return l
}

// hearing reads a connection and counts.
type hearing struct {
	r io.Reader
	f *flow
}

// Read implements io.Reader.
func (h hearing) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	if n > 0 {
		h.f.in.Add(uint64(n))
		h.f.heard.Store(time.Now().UnixNano())
	}
	return n, err
}

// send sends a message and returns how many bytes that were.
func (l *link) send(m wire.Message) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.buf = wire.Append(l.buf[:0], m)
	return len(l.buf), l.write(l.buf)
}

// trySend sends a sign of life, unless somebody is sending. It does not count.
func (l *link) trySend(m wire.Message) error {
	if !l.mu.TryLock() {
		return nil
	}
	defer l.mu.Unlock()
	l.buf = wire.Append(l.buf[:0], m)
	_, err := l.conn.Write(l.buf)
	return err
}

// write sends bytes.
//
// Precondition: l.mu is held.
func (l *link) write(b []byte) error {
	n, err := l.conn.Write(b)
	l.flow.out.Add(uint64(n))
	return err
}

// writeAll sends slices one after another; it changes the slice of them.
//
// Precondition: l.mu is held.
func (l *link) writeAll(b *net.Buffers) error {
	var n int64
	var err error
	if l.gather != nil {
		n, err = l.gather.WriteBuffers(b)
	} else {
		n, err = b.WriteTo(l.conn)
	}
	l.flow.out.Add(uint64(n))
	return err
}

// wake lets whoever reads or writes return with an error. Something may still have
// to be said on a control connection, so that what is being written there gets some
// time: TLS cannot go on after a write that was given up.
func (l *link) wake(control bool) {
	_ = l.conn.SetReadDeadline(time.Unix(1, 0))
	end := time.Unix(1, 0)
	if control {
		end = time.Now().Add(partingLimit)
	}
	_ = l.conn.SetWriteDeadline(end)
}

// partingLimit is how long a side that ends a migration waits for the other one
// to read why.
const partingLimit = time.Second

// part says why the migration ends, if there is something to say, and closes the
// connection. Nobody uses the link any more. What the peer still sends is read,
// since the kernel would otherwise reset the connection before the peer has read
// what was said.
func (l *link) part(m wire.Message) {
	defer func() { _ = l.conn.Close() }()
	if l.conn.SetDeadline(time.Now().Add(partingLimit)) != nil {
		return
	}
	if m != nil {
		if _, err := l.send(m); err != nil {
			return
		}
	}
	half, ok := l.conn.(interface{ CloseWrite() error })
	if !ok || half.CloseWrite() != nil {
		return
	}
	_, _ = io.Copy(io.Discard, l.conn)
}

// lost makes an error of a connection one for people.
func lost(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) {
		return &LostError{errors.New("the other side closed it")}
	}
	var format *wire.Error
	if errors.As(err, &format) {
		return err
	}
	return &LostError{err}
}

// LostError says that the connection to the other side was lost.
type LostError struct{ Err error }

// Error implements error.
func (e *LostError) Error() string { return "the connection was lost: " + e.Err.Error() }

// Unwrap returns the cause.
func (e *LostError) Unwrap() error { return e.Err }
