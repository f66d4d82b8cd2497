package serial

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

const (
	// transmitBuffer is how many bytes wait for Output before the guest is
	// told to wait. A boot log is some 30 KiB.
	transmitBuffer = 64 << 10
	// coalesce is how long the beginning of a line waits for the rest, so
	// that a line is one write and not eighty.
	coalesce = 2 * time.Millisecond
)

// transmitter buffers what the guest sends and writes it to Output in batches.
//
//	send --> pending --(new line, half full, or 2 ms)--> goroutine --> Output
type transmitter struct {
	output  io.Writer
	logger  *slog.Logger
	onReady func() // called without mu when the buffer was full and has room

	wake   chan struct{} // pending became non-empty
	urgent chan struct{} // write without waiting for more
	quit   chan struct{}
	done   chan struct{}

	mu      sync.Mutex
	idle    *sync.Cond // nothing pending and nothing being written, or stopped
	pending []byte
	spare   []byte // the other buffer
	full    bool   // send was refused, or the next would be
	writing bool
	stopped bool
	stats   Stats
}

// Stats counts bytes since the device was made.
type Stats struct {
	Sent uint64 // written to Output
	Lost uint64 // sent by the guest against LSR, or refused by Output
}

// start starts the goroutine.
func (t *transmitter) start(output io.Writer, logger *slog.Logger, onReady func()) {
	if logger == nil {
		logger = slog.New(slog.DiscardHandler)
	}
	t.output, t.logger, t.onReady = output, logger, onReady
	t.wake, t.urgent = make(chan struct{}, 1), make(chan struct{}, 1)
	t.quit, t.done = make(chan struct{}), make(chan struct{})
	t.idle = sync.NewCond(&t.mu)
	go t.run()
}

// stop writes what is pending and joins the goroutine.
func (t *transmitter) stop() {
	t.mu.Lock()
	first := !t.stopped
	t.stopped = true
	t.mu.Unlock()
	if first {
		close(t.quit)
	}
	<-t.done
}

// ready reports whether send would take a byte.
func (t *transmitter) ready() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return !t.full
}

// send takes a byte from the guest and reports whether there is room for more.
func (t *transmitter) send(b byte) bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.full || t.stopped {
		t.stats.Lost++
		return !t.full
	}
	t.pending = append(t.pending, b)
	n := len(t.pending)
	t.full = n == transmitBuffer
	if n == 1 {
		signal(t.wake)
	}
	if b == '\n' || n == transmitBuffer/2 || t.full {
		signal(t.urgent)
	}
	return !t.full
}

// signal leaves a token in c unless there is one.
func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// run writes batches until stop.
func (t *transmitter) run() {
	defer close(t.done)
	timer := time.NewTimer(coalesce)
	defer timer.Stop()
	for {
		select {
		case <-t.wake:
		case <-t.quit:
			t.writeBatch()
			return
		}
		timer.Reset(coalesce)
		select {
		case <-t.urgent:
		case <-timer.C:
		case <-t.quit:
		}
		t.writeBatch()
	}
}

// writeBatch writes what is pending.
func (t *transmitter) writeBatch() {
	t.mu.Lock()
	batch := t.pending
	t.pending, t.spare = t.spare[:0], nil
	wasFull := t.full
	t.full, t.writing = false, true
	t.mu.Unlock()

	if wasFull {
		t.onReady()
	}
	written, err := 0, error(nil)
	if len(batch) > 0 {
		written, err = t.output.Write(batch)
	}
	if err != nil {
		t.logger.Warn("console output failed", "dev", "serial", "bytes", len(batch)-written, "err", err)
	}

	t.mu.Lock()
	defer t.mu.Unlock()
	t.spare, t.writing = batch, false
	t.stats.Sent += uint64(written)
	t.stats.Lost += uint64(len(batch) - written)
	if len(t.pending) == 0 {
		t.idle.Broadcast()
	}
}

// Flush waits until everything that the guest has sent was written to Output.
func (d *Device) Flush(ctx context.Context) error {
	t := &d.out
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.idle.Broadcast()
	})
	defer stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.pending) > 0 || t.writing {
		if ctx.Err() != nil {
			return fmt.Errorf("flush serial output: %w", ctx.Err())
		}
		signal(t.urgent)
		t.idle.Wait()
	}
	return nil
}

// Stats returns the counters.
func (d *Device) Stats() Stats {
	d.out.mu.Lock()
	defer d.out.mu.Unlock()
	return d.out.stats
}
