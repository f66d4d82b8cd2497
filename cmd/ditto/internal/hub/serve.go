package hub

import (
	"fmt"
	"net"
	"os"
	"time"
)

// Listen makes the unix socket at path, which only its user may open.
func Listen(path string) (*net.UnixListener, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("console socket: %w", err)
	}
	l.SetUnlinkOnClose(false)
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fmt.Errorf("console socket: %w", err)
	}
	return l, nil
}

// Serve accepts terminals on l until l is closed. Each is shown the latest
// output and then what follows; what it sends goes to input, which may block.
// A connection ends when its peer closes it or the hub is closed.
func (h *Hub) Serve(l net.Listener, input func([]byte)) {
	h.running.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			h.attach(c, input)
		}
	})
}

func (h *Hub) attach(c net.Conn, input func([]byte)) {
	h.mu.Lock()
	full := len(h.conns) >= maxConnections
	if full {
		h.mu.Unlock()
		_, _ = fmt.Fprintf(c, "[ditto: %d terminals are attached already: detach one]\r\n", maxConnections)
		_ = c.Close()
		return
	}
	if h.closed {
		// It gets the last words, if it takes them now.
		_ = c.SetWriteDeadline(time.Now().Add(StallLimit))
	}
	h.conns[c] = struct{}{}
	h.mu.Unlock()

	drop := func() {
		_ = c.Close()
		h.mu.Lock()
		delete(h.conns, c)
		h.changed.Broadcast()
		h.mu.Unlock()
	}
	r := &reader{out: c, announce: true}
	h.add(r, true, drop)
	h.running.Go(func() {
		defer h.detach(r)
		buf := make([]byte, 1024)
		for {
			n, err := c.Read(buf)
			if n > 0 {
				input(buf[:n])
			}
			if err != nil {
				return
			}
		}
	})
}

// detach makes r end without waiting for more output.
func (h *Hub) detach(r *reader) {
	h.mu.Lock()
	r.gone = true
	h.changed.Broadcast()
	h.mu.Unlock()
}
