package pki

import (
	"bufio"
	"context"
	"crypto/tls"
	"net"
	"sync"
	"sync/atomic"
)

// Conn is a connection of TLS for much data. The records that one Write, or one
// [Conn.WriteBuffers], makes reach the socket in few system calls, and many are
// read by one; crypto/tls has one call for each record of at most 16 KiB
// (RFC 8446 5.1).
//
//	Write --> tls.Conn --16 KiB records--> batch --up to 256 KiB--> socket
//
// Failures are explained: a peer that does not like this side's certificate says
// so when this side has done its part of the handshake and reads (RFC 8446
// 4.4.2.4). As any net.Conn it may be used by many goroutines.
type Conn struct {
	*tls.Conn
	batch *batch
	stage []byte // of WriteBuffers, whose callers take turns
	turn  sync.Mutex
}

// Client is the side that connected.
func Client(c net.Conn, config *tls.Config) *Conn {
	b := &batch{Conn: c}
	return &Conn{Conn: tls.Client(b, config), batch: b}
}

// Server is the side that accepted.
func Server(c net.Conn, config *tls.Config) *Conn {
	b := &batch{Conn: c}
	return &Conn{Conn: tls.Server(b, config), batch: b}
}

// Read implements net.Conn.
func (c *Conn) Read(p []byte) (int, error) {
	if err := c.ready(); err != nil {
		return 0, err
	}
	n, err := c.Conn.Read(p)
	return n, Explain(err)
}

// ready makes the handshake if it was not made. What a stranger sends before is
// read without a large buffer.
func (c *Conn) ready() error {
	if c.batch.known.Load() {
		return nil
	}
	if err := c.HandshakeContext(context.Background()); err != nil { // deadlines bound it
		return Explain(err)
	}
	c.batch.known.Store(true)
	return nil
}

// Write implements net.Conn.
func (c *Conn) Write(p []byte) (int, error) {
	if len(p) <= maxRecord {
		n, err := c.Conn.Write(p)
		return n, Explain(err)
	}
	if err := c.ready(); err != nil { // nothing of it may be held
		return 0, err
	}
	c.batch.hold()
	n, err := c.Conn.Write(p)
	if failed := c.batch.release(); err == nil && failed != nil {
		n, err = 0, failed
	}
	return n, Explain(err)
}

// Close implements net.Conn. While something is being written the peer is not told
// of the end first: as with crypto/tls, which would not know of what is gathered.
func (c *Conn) Close() error {
	if c.batch.busy.Load() > 0 {
		return c.batch.Conn.Close()
	}
	return c.Conn.Close()
}

// maxRecord is how much data a record has at most.
const maxRecord = 16 << 10

// WriteBuffers writes slices one after another, and consumes them as
// [net.Buffers.WriteTo] does. The bytes may change meanwhile: what the peer gets
// of them is what was read once.
func (c *Conn) WriteBuffers(buffers *net.Buffers) (n int64, err error) {
	if err := c.ready(); err != nil {
		return 0, err
	}
	c.turn.Lock()
	defer c.turn.Unlock()
	c.batch.hold()
	defer func() {
		if failed := c.batch.release(); err == nil {
			err = failed
		}
		err = Explain(err)
	}()
	c.stage = c.stage[:0]
	write := func(p []byte) {
		if err == nil && len(p) > 0 {
			var m int
			m, err = c.Conn.Write(p)
			n += int64(m)
		}
	}
	for len(*buffers) > 0 && err == nil {
		p := (*buffers)[0]
		*buffers = (*buffers)[1:]
		if len(c.stage)+len(p) <= maxRecord { // small slices share a record
			c.stage = append(c.stage, p...)
			continue
		}
		write(c.stage)
		if c.stage = c.stage[:0]; len(p) <= maxRecord {
			c.stage = append(c.stage, p...)
			continue
		}
		write(p)
	}
	write(c.stage)
	return n, err
}

// batchSize is how many bytes of records are written at once.
const batchSize = 256 << 10

// readSize is how many are read at once, at most.
const readSize = 128 << 10

// batch is what is below TLS: while it is held it gathers what is written.
// Deadlines and Close reach the socket at once. A failed write fails all that
// come after it, as bytes that were taken are lost.
type batch struct {
	net.Conn
	known atomic.Bool // the handshake is done
	in    *bufio.Reader
	busy  atomic.Int32 // who holds it, without mu

	mu   sync.Mutex // guards what follows, and keeps what is written in order
	held int
	buf  []byte
	err  error
}

// Read implements net.Conn. TLS reads by one goroutine at a time.
func (b *batch) Read(p []byte) (int, error) {
	if b.in == nil {
		if !b.known.Load() {
			return b.Conn.Read(p)
		}
		b.in = bufio.NewReaderSize(b.Conn, readSize)
	}
	return b.in.Read(p)
}

// Write implements net.Conn.
func (b *batch) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return 0, b.err
	}
	if b.held == 0 {
		return b.Conn.Write(p)
	}
	if len(b.buf)+len(p) > batchSize {
		b.flush()
	}
	b.buf = append(b.buf, p...)
	return len(p), b.err
}

// hold gathers from now on.
func (b *batch) hold() {
	b.busy.Add(1)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held++
}

// release ends a hold, and writes what was gathered.
func (b *batch) release() error {
	defer b.busy.Add(-1)
	b.mu.Lock()
	defer b.mu.Unlock()
	b.held--
	b.flush()
	return b.err
}

// flush writes what was gathered.
//
// Precondition: b.mu is held.
func (b *batch) flush() {
	if len(b.buf) > 0 && b.err == nil {
		_, b.err = b.Conn.Write(b.buf)
	}
	b.buf = b.buf[:0]
}
