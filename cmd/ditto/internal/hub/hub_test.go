package hub

import (
	"bytes"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// gate is a writer that takes nothing until it is opened.
type gate struct {
	open chan struct{}
	mu   sync.Mutex
	got  bytes.Buffer
}

func newGate() *gate { return &gate{open: make(chan struct{})} }

func (g *gate) Write(p []byte) (int, error) {
	<-g.open
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.Write(p)
}

func (g *gate) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.got.String()
}

func opened() *gate {
	g := newGate()
	close(g.open)
	return g
}

// pattern is n bytes of numbered lines.
func pattern(n int) []byte {
	var b bytes.Buffer
	for i := 0; b.Len() < n; i++ {
		b.WriteString(strings.Repeat(string(rune('a'+i%26)), 60) + "\n")
	}
	return b.Bytes()[:n]
}

func TestEveryoneGetsEverything(t *testing.T) {
	h := New()
	log, out := opened(), opened()
	h.AddLog(log)
	h.AddOutput(out)
	want := pattern(3*RingBytes + 17)
	for rest := want; len(rest) > 0; {
		n := min(len(rest), 1000)
		if written, err := h.Write(rest[:n]); written != n || err != nil {
			t.Fatal(written, err)
		}
		rest = rest[n:]
	}
	h.Close()
	if log.String() != string(want) || out.String() != string(want) {
		t.Errorf("log has %d bytes and output %d of %d", log.got.Len(), out.got.Len(), len(want))
	}
	if _, err := h.Write([]byte("late")); !errors.Is(err, io.ErrClosedPipe) {
		t.Errorf("write after close: %v", err)
	}
}

// TestSlowOutput: the guest waits for an output that does not move, but not
// for ever, and the output is told what it lost.
func TestSlowOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		log, slow := opened(), newGate()
		h.AddLog(log)
		h.AddOutput(slow)
		want := pattern(2 * RingBytes)
		done := make(chan struct{})
		go func() {
			defer close(done)
			if _, err := h.Write(want); err != nil {
				t.Error(err)
			}
		}()
		synctest.Wait()
		select {
		case <-done:
			t.Error("the guest did not wait")
		default:
		}
		<-done // virtual time passes the limit
		close(slow.open)
		h.Close()
		if log.String() != string(want) {
			t.Errorf("the log has %d of %d bytes", log.got.Len(), len(want))
		}
		got := slow.String()
		if !strings.Contains(got, "bytes of output were lost here") || !strings.HasSuffix(got, string(want[RingBytes+chunkBytes:])) {
			t.Errorf("the slow output has %d bytes and was not told", len(got))
		}
	})
}

// TestStuckOutput: a hub can be closed although an output never moves again.
func TestStuckOutput(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := New()
		stuck := newGate()
		h.AddOutput(stuck)
		if _, err := h.Write([]byte("x")); err != nil {
			t.Fatal(err)
		}
		h.Close()
		close(stuck.open)
	})
}

func TestFailingOutputIsDropped(t *testing.T) {
	h := New()
	r, w := io.Pipe()
	_ = r.Close()
	h.AddOutput(w)
	if _, err := h.Write(pattern(3 * RingBytes)); err != nil {
		t.Error(err)
	}
	h.Close()
}

func socket(t *testing.T) (*net.UnixListener, string) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-hub-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "console.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	return l, path
}

func dial(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

func TestTerminals(t *testing.T) {
	h := New()
	l, path := socket(t)
	input := make(chan string, 1)
	h.Serve(l, func(p []byte) { input <- string(p) })
	past := pattern(2 * RingBytes)
	if _, err := h.Write(past); err != nil {
		t.Fatal(err)
	}
	first := dial(t, path)
	// The past, cut at a line, then what follows.
	start := len(past) - replayBytes
	start += bytes.IndexByte(past[start:], '\n') + 1
	want := string(past[start:]) + "now"
	got := make([]byte, len(want)-3)
	if _, err := io.ReadFull(first, got); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Write([]byte("now")); err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, 3)
	if _, err := io.ReadFull(first, rest); err != nil || string(got)+string(rest) != want {
		t.Errorf("replay differs, %v", err)
	}
	if _, err := first.Write([]byte("keys")); err != nil || <-input != "keys" {
		t.Error("input did not arrive", err)
	}
	// A terminal that went away frees its place.
	_ = first.Close()
	for range 3 * maxConnections {
		c := dial(t, path)
		if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		// Its place is free when the hub has noticed.
		h.mu.Lock()
		for len(h.conns) > maxConnections/2 {
			h.changed.Wait()
		}
		h.mu.Unlock()
	}
	second := dial(t, path)
	if _, err := io.ReadFull(second, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_ = l.Close()
	h.Close()
	if _, err := io.ReadAll(second); err != nil {
		t.Errorf("the end of the console is not an end of file: %v", err)
	}
}

func TestTooManyTerminals(t *testing.T) {
	h := New()
	l, path := socket(t)
	h.Serve(l, func([]byte) {})
	if _, err := h.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	for range maxConnections {
		if _, err := io.ReadFull(dial(t, path), make([]byte, 1)); err != nil {
			t.Fatal(err)
		}
	}
	text, err := io.ReadAll(dial(t, path))
	if err != nil || !strings.Contains(string(text), "detach one") {
		t.Errorf("%q, %v", text, err)
	}
	_ = l.Close()
	h.Close()
}

// TestSlowTerminal: a terminal that takes nothing costs the guest nothing.
func TestSlowTerminal(t *testing.T) {
	h := New()
	l, path := socket(t)
	h.Serve(l, func([]byte) {})
	if _, err := h.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	c := dial(t, path)
	if _, err := io.ReadFull(c, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	for range 16 {
		if _, err := h.Write(pattern(RingBytes)); err != nil {
			t.Fatal(err)
		}
	}
	_ = l.Close()
	done := make(chan string)
	go func() {
		text, _ := io.ReadAll(c)
		done <- string(text)
	}()
	h.Close()
	if text := <-done; !strings.Contains(text, "bytes of output were lost here") {
		t.Errorf("%d bytes, and no word of what was lost", len(text))
	}
}
