// Package hub hands what a guest writes to its console to everyone who
// listens: the log on disk, standard output, attached terminals.
//
//	guest --Write--> ring --> reader "log"     (waited for)
//	                      --> reader "stdout"  (waited for, up to a limit)
//	                      --> reader per connection (may lose output)
//	guest <--input-- connections
//
// One ring holds the latest output, and each reader has a position in it and a
// goroutine of its own. A reader that is waited for slows the guest down when
// it falls a whole ring behind; one that has not moved for [StallLimit] is
// given up on until it has caught up: a terminal stopped with Ctrl-S must not
// stop a guest for good. What a reader lost is told to it in one line.
package hub

import (
	"fmt"
	"io"
	"net"
	"sync"
	"time"
)

// Sizes and limits.
const (
	// RingBytes is how far a reader may fall behind before it loses output.
	RingBytes = 256 << 10
	// replayBytes is how much of the past a new connection is shown.
	replayBytes = 32 << 10
	// chunkBytes is the most that a reader is handed at once.
	chunkBytes = 16 << 10
	// maxConnections bounds attached terminals.
	maxConnections = 16
	// StallLimit is how long the guest waits for a reader that does not move.
	StallLimit = 2 * time.Second
)

// Hub distributes a console. The zero value is not usable; see [New].
type Hub struct {
	mu      sync.Mutex // guards what follows
	changed *sync.Cond // signalled on every change
	ring    []byte
	end     int64 // bytes ever written
	closed  bool
	readers map[*reader]struct{}
	conns   map[net.Conn]struct{}

	running sync.WaitGroup
}

// reader is one listener.
type reader struct {
	out      io.Writer
	pos      int64 // of the next byte it gets
	waitFor  bool  // the guest waits for it
	givenUp  bool  // it did not move for too long; until it has caught up
	announce bool  // tell it what it lost
	gone     bool  // nobody is there any more
}

// New returns a hub without listeners.
func New() *Hub {
	h := &Hub{ring: make([]byte, RingBytes), readers: map[*reader]struct{}{}, conns: map[net.Conn]struct{}{}}
	h.changed = sync.NewCond(&h.mu)
	return h
}

// AddLog adds a listener that the guest waits for and that is told of nothing
// but the guest's own bytes. Add it before the guest starts.
func (h *Hub) AddLog(w io.Writer) { h.add(&reader{out: w, waitFor: true}, false, nil) }

// AddOutput adds a listener that the guest waits for, and that gets a line when
// it lost something all the same.
func (h *Hub) AddOutput(w io.Writer) {
	h.add(&reader{out: w, waitFor: true, announce: true}, false, nil)
}

// add starts a reader, from the latest output if replay is set, else from now.
// done is called when it has ended.
func (h *Hub) add(r *reader, replay bool, done func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	r.pos = h.end
	if replay {
		r.pos = h.replayStart()
	}
	h.readers[r] = struct{}{}
	h.running.Go(func() {
		h.serve(r)
		if done != nil {
			done()
		}
	})
}

// replayStart is the start of a line at most replayBytes back. Preconditions:
// mu is held.
func (h *Hub) replayStart() int64 {
	oldest := max(0, h.end-int64(len(h.ring)))
	start := max(oldest, h.end-replayBytes)
	if start == 0 {
		return 0
	}
	for pos := start; pos < h.end; pos++ {
		if h.ring[pos%int64(len(h.ring))] == '\n' {
			return pos + 1
		}
	}
	return start
}

// Write takes the guest's output. It blocks while a reader that is waited for
// is a whole ring behind, and never fails before [Hub.Close].
func (h *Hub) Write(p []byte) (int, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	written := 0
	for written < len(p) {
		room := h.waitRoom()
		if h.closed {
			return written, io.ErrClosedPipe
		}
		chunk := p[written:min(len(p), written+room)]
		for len(chunk) > 0 {
			n := copy(h.ring[h.end%int64(len(h.ring)):], chunk)
			h.end += int64(n)
			written += n
			chunk = chunk[n:]
		}
		h.changed.Broadcast()
	}
	return written, nil
}

// waitRoom waits until the slowest reader that is waited for leaves room in the
// ring, and returns how much. Preconditions: mu is held.
func (h *Hub) waitRoom() int {
	for {
		slowest := h.slowest()
		if slowest == nil {
			return len(h.ring)
		}
		if room := int64(len(h.ring)) - (h.end - slowest.pos); room > 0 || h.closed {
			return int(room)
		}
		h.waitFor(slowest)
	}
}

// slowest returns the reader furthest behind of those that are waited for.
// Preconditions: mu is held.
func (h *Hub) slowest() *reader {
	var slowest *reader
	for r := range h.readers {
		if r.waitFor && !r.givenUp && (slowest == nil || r.pos < slowest.pos) {
			slowest = r
		}
	}
	return slowest
}

// waitFor returns when r has moved or gone, and gives it up when it has not for
// the limit. Preconditions: mu is held.
func (h *Hub) waitFor(r *reader) {
	pos, late := r.pos, false
	timer := time.AfterFunc(StallLimit, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late = true
		h.changed.Broadcast()
	})
	defer timer.Stop()
	for r.pos == pos && !h.closed && !late {
		if _, there := h.readers[r]; !there {
			return
		}
		h.changed.Wait()
	}
	if r.pos == pos && late {
		r.givenUp = true
	}
}

// serve hands output to r until the hub is closed and everything was handed
// over, or r fails.
func (h *Hub) serve(r *reader) {
	buf := make([]byte, chunkBytes)
	for {
		n, lost, ok := h.next(r, buf)
		if !ok {
			break
		}
		if lost > 0 && r.announce {
			if _, err := fmt.Fprintf(r.out, "\r\n[ditto: %d bytes of output were lost here]\r\n", lost); err != nil {
				break
			}
		}
		if _, err := r.out.Write(buf[:n]); err != nil {
			break
		}
		h.mu.Lock()
		r.pos += int64(n)
		if r.pos == h.end {
			r.givenUp = false
		}
		h.changed.Broadcast()
		h.mu.Unlock()
	}
	h.mu.Lock()
	delete(h.readers, r)
	h.changed.Broadcast()
	h.mu.Unlock()
}

// next waits for output and copies what r gets next. lost is what the ring
// overwrote before that.
func (h *Hub) next(r *reader, buf []byte) (n int, lost int64, ok bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for r.pos == h.end && !r.gone {
		if h.closed {
			return 0, 0, false
		}
		h.changed.Wait()
	}
	if r.gone {
		return 0, 0, false
	}
	if oldest := h.end - int64(len(h.ring)); r.pos < oldest {
		lost = oldest - r.pos
		r.pos = oldest
	}
	for n < len(buf) && r.pos+int64(n) < h.end {
		at := (r.pos + int64(n)) % int64(len(h.ring))
		until := min(int64(len(h.ring)), at+h.end-r.pos-int64(n))
		n += copy(buf[n:], h.ring[at:until])
	}
	return n, lost, true
}

// Close ends the hub: readers get what is in the ring, for as long as they keep
// taking it, then connections are closed. It returns when all goroutines have
// ended, except one that is stuck writing for longer than the limit.
func (h *Hub) Close() {
	h.mu.Lock()
	h.closed = true
	h.changed.Broadcast()
	for len(h.readers) > 0 && h.moves() {
	}
	for c := range h.conns {
		_ = c.Close()
	}
	stuck := len(h.readers) > 0
	h.mu.Unlock()
	if !stuck {
		h.running.Wait()
	}
}

// moves waits until any reader moves or ends, and reports whether one did
// within the limit. Preconditions: mu is held.
func (h *Hub) moves() bool {
	progress := func() (p [2]int64) {
		for r := range h.readers {
			p[0] += r.pos
		}
		p[1] = int64(len(h.readers))
		return p
	}
	before, late := progress(), false
	timer := time.AfterFunc(StallLimit, func() {
		h.mu.Lock()
		defer h.mu.Unlock()
		late = true
		h.changed.Broadcast()
	})
	defer timer.Stop()
	for progress() == before && !late {
		h.changed.Wait()
	}
	return progress() != before
}
