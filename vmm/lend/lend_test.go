package lend

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var errBusy = errors.New("busy")

var testKinds = Kinds{"busy": errBusy}

// serve runs a server with the operation op, and returns its socket.
func serve(t *testing.T, op Operation) (string, *Server) {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "ditto-lend-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	path := filepath.Join(dir, "ops.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(map[string]Operation{"op": op}, testKinds, slog.New(slog.NewTextHandler(t.Output(), nil)))
	s.Serve(l)
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return path, s
}

// refuse is a client that answers nothing.
func refuse(context.Context, string, json.RawMessage) (any, []*os.File, error) {
	return nil, nil, errBusy
}

func TestOperation(t *testing.T) {
	path, _ := serve(t, func(ctx context.Context, s *Session, options json.RawMessage) (any, error) {
		s.Tell(map[string]int{"done": 1})
		var said string
		files, err := s.Ask(ctx, "two-files", map[string]string{"like": string(options)}, &said, 2)
		if err != nil {
			return nil, err
		}
		defer closeAll(files)
		for i, f := range files {
			if err := CheckRegular(f, unix.O_RDWR); err != nil {
				return nil, err
			}
			if _, err := f.WriteAt([]byte{byte('a' + i)}, 0); err != nil {
				return nil, err
			}
		}
		if _, err := s.Ask(ctx, "busy", nil, nil, 0); !errors.Is(err, errBusy) {
			return nil, errors.New("the failure is lost")
		}
		return said, nil
	})
	dir := t.TempDir()
	var events []string
	client := Client{
		Kinds: testKinds,
		Event: func(e json.RawMessage) { events = append(events, string(e)) },
		Answer: func(_ context.Context, what string, args json.RawMessage) (any, []*os.File, error) {
			if what == "busy" {
				return nil, nil, errBusy
			}
			var files []*os.File
			for _, name := range []string{"0", "1"} {
				f, err := os.Create(filepath.Join(dir, name))
				if err != nil {
					return nil, nil, err
				}
				files = append(files, f)
			}
			return what + string(args), files, nil
		},
	}
	var result string
	if err := client.Call(t.Context(), path, "op", 5, &result); err != nil {
		t.Fatal(err)
	}
	if result != `two-files{"like":"5"}` || len(events) != 1 || events[0] != `{"done":1}` {
		t.Errorf("%q, events %v", result, events)
	}
	for name, want := range map[string]string{"0": "a", "1": "b"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != want {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	err := Client{Kinds: testKinds, Answer: refuse}.Call(t.Context(), path, "op", nil, nil)
	if !errors.Is(err, errBusy) || err.Error() != "busy" {
		t.Errorf("%v", err)
	}
	if err := (Client{Answer: refuse}).Call(t.Context(), path, "other", nil, nil); err == nil || !strings.Contains(err.Error(), "does not know the operation other") {
		t.Errorf("%v", err)
	}
	if err := (Client{Answer: refuse}).Call(t.Context(), path+"x", "op", nil, nil); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no machine: %v", err)
	}
}

// TestFilesAreCounted: more or fewer descriptors than were asked for are closed,
// and the operation is told.
func TestFilesAreCounted(t *testing.T) {
	for _, lent := range []int{0, 2, MaxFiles, MaxFiles + 1} {
		path, _ := serve(t, func(ctx context.Context, s *Session, _ json.RawMessage) (any, error) {
			files, err := s.Ask(ctx, "one", nil, nil, 1)
			if files != nil {
				t.Errorf("%d lent: got %d", lent, len(files))
			}
			return nil, err
		})
		closed := make([]*os.File, lent)
		client := Client{Answer: func(context.Context, string, json.RawMessage) (any, []*os.File, error) {
			files := make([]*os.File, lent)
			for i := range files {
				var err error
				if files[i], err = os.Open(os.DevNull); err != nil {
					return nil, nil, err
				}
			}
			copy(closed, files)
			return nil, files, nil
		}}
		before := openFiles(t)
		if err := client.Call(t.Context(), path, "op", nil, nil); err == nil {
			t.Errorf("%d lent: nobody noticed", lent)
		}
		for _, f := range closed {
			if err := f.Close(); !errors.Is(err, os.ErrClosed) {
				t.Errorf("%d lent: the client's stay open: %v", lent, err)
			}
		}
		// The machine's connection goes a moment after the client's.
		for deadline := time.Now().Add(10 * time.Second); openFiles(t) > before; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d lent: %d files are open, %d before", lent, openFiles(t), before)
			}
		}
	}
}

func openFiles(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

// TestCancel: a client that cancels still answers, and waits for the end.
func TestCancel(t *testing.T) {
	undone := false
	path, _ := serve(t, func(ctx context.Context, s *Session, _ json.RawMessage) (any, error) {
		s.Tell("running")
		<-ctx.Done()
		if _, err := s.Ask(ctx, "more", nil, nil, 0); !errors.Is(err, context.Canceled) {
			t.Errorf("asked for more: %v", err)
		}
		if _, err := s.Ask(context.Background(), "undo", nil, nil, 0); err != nil {
			t.Errorf("undo: %v", err)
		}
		return nil, context.Cause(ctx)
	})
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	client := Client{
		Event: func(json.RawMessage) { cancel() },
		Answer: func(_ context.Context, what string, _ json.RawMessage) (any, []*os.File, error) {
			undone = undone || what == "undo"
			return nil, nil, nil
		},
	}
	if err := client.Call(ctx, path, "op", nil, nil); !errors.Is(err, context.Canceled) || errors.Is(err, ErrGone) {
		t.Errorf("%v", err)
	}
	if !undone {
		t.Error("nothing was undone")
	}
}

// dial connects as a client that does as it likes, and says hello.
func dial(t *testing.T, path string) *conn {
	t.Helper()
	c, err := net.DialUnix(network, nil, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	hello := newConn(c)
	if err := hello.write(message{Kind: kindHello, Version: Version, Name: "op"}); err != nil {
		t.Fatal(err)
	}
	return hello
}

// TestClientGone: an operation whose client is gone is canceled, and what it
// asks for fails.
func TestClientGone(t *testing.T) {
	ended := make(chan error, 1)
	path, _ := serve(t, func(ctx context.Context, s *Session, _ json.RawMessage) (any, error) {
		_, err := s.Ask(ctx, "never", nil, nil, 0)
		<-ctx.Done()
		_, undo := s.Ask(context.Background(), "undo", nil, nil, 0)
		ended <- errors.Join(err, undo)
		if !errors.Is(context.Cause(ctx), ErrGone) || !errors.Is(undo, ErrGone) || !errors.Is(err, ErrGone) {
			t.Errorf("%v; %v; %v", err, context.Cause(ctx), undo)
		}
		return nil, err
	})
	c := dial(t, path)
	if m, _, err := c.read(); err != nil || m.Name != "never" {
		t.Fatalf("%+v, %v", m, err)
	}
	_ = c.Close()
	<-ended
}

// TestHostileClient: whatever a client sends, it is answered or cut off.
func TestHostileClient(t *testing.T) {
	path, _ := serve(t, func(ctx context.Context, s *Session, _ json.RawMessage) (any, error) {
		_, err := s.Ask(ctx, "x", nil, nil, 0)
		return nil, err
	})
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	many := make([]int, MaxFiles+1)
	for i := range many {
		many[i] = int(null.Fd())
	}
	for name, send := range map[string]func(c *conn) error{
		"nonsense":       func(c *conn) error { _, err := c.Write([]byte("nonsense")); return err },
		"too long":       func(c *conn) error { _, err := c.Write(make([]byte, MaxMessage+1)); return err },
		"of the machine": func(c *conn) error { return c.write(message{Kind: kindEnd}) },
		"hello again":    func(c *conn) error { return c.write(message{Kind: kindHello, Version: Version, Name: "op"}) },
		"unasked":        func(c *conn) error { return c.write(message{Kind: kindAnswer, ID: 99}) },
		"files":          func(c *conn) error { return c.write(message{Kind: kindCancel}, null) },
		"many files": func(c *conn) error {
			_, _, err := c.WriteMsgUnix([]byte(`{"kind":"answer","id":1}`), unix.UnixRights(many...), nil)
			return err
		},
	} {
		c := dial(t, path)
		if m, _, err := c.read(); err != nil || m.Kind != kindAsk {
			t.Fatalf("%s: %+v, %v", name, m, err)
		}
		if err := send(c); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if m, _, err := c.read(); err != nil || m.Kind != kindEnd || m.Failure == nil {
			t.Errorf("%s: %+v, %v", name, m, err)
		}
	}
	// A connection that does not begin with hello.
	c, err := net.DialUnix(network, nil, &net.UnixAddr{Name: path, Net: network})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := newConn(c).write(message{Kind: kindCancel}); err != nil {
		t.Fatal(err)
	}
	if m, _, err := newConn(c).read(); err != nil || m.Failure == nil || !strings.Contains(m.Failure.Text, "begins with cancel") {
		t.Errorf("%+v, %v", m, err)
	}
}

// TestHostileMachine: a machine that does not keep to the protocol ends the call.
func TestHostileMachine(t *testing.T) {
	for name, sent := range map[string][]message{
		"hello":    {{Kind: kindHello, Version: Version, Name: "op"}},
		"answer":   {{Kind: kindAnswer, ID: 1}},
		"a string": {{Kind: kindEnd, Body: json.RawMessage(`"x"`)}},
	} {
		dir, err := os.MkdirTemp("/tmp", "ditto-lend-")
		if err != nil {
			t.Fatal(err)
		}
		defer os.RemoveAll(dir)
		l, err := Listen(filepath.Join(dir, "s"))
		if err != nil {
			t.Fatal(err)
		}
		var machine sync.WaitGroup
		machine.Go(func() {
			accepted, err := l.AcceptUnix()
			if err != nil {
				t.Error(err)
				return
			}
			c := newConn(accepted)
			defer c.Close()
			for _, m := range sent {
				if err := c.write(m); err != nil {
					t.Error(err)
				}
			}
			for err == nil {
				_, _, err = c.read()
			}
		})
		var result int
		if err := (Client{Answer: refuse}).Call(t.Context(), filepath.Join(dir, "s"), "op", nil, &result); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
		machine.Wait()
		_ = l.Close()
	}
}

// TestSlowClient: events never make the machine wait, and an operation goes on
// without a client that reads.
func TestSlowClient(t *testing.T) {
	told := make(chan struct{})
	path, _ := serve(t, func(_ context.Context, s *Session, _ json.RawMessage) (any, error) {
		for range 10_000 {
			s.Tell(strings.Repeat("x", 1000))
		}
		close(told)
		return "result", nil
	})
	c := dial(t, path)
	<-told
	for {
		m, _, err := c.read()
		if err != nil {
			t.Fatal(err)
		}
		if m.Kind == kindEnd {
			if string(m.Body) != `"result"` {
				t.Errorf("%s", m.Body)
			}
			return
		}
	}
}

// TestCloseWaits: an operation that is about to end is not canceled by the end
// of the machine.
func TestCloseWaits(t *testing.T) {
	running, end := make(chan struct{}), make(chan struct{})
	path, server := serve(t, func(ctx context.Context, _ *Session, _ json.RawMessage) (any, error) {
		close(running)
		<-end
		return "saved", ctx.Err()
	})
	done := make(chan error, 1)
	var result string
	go func() { done <- Client{Answer: refuse}.Call(t.Context(), path, "op", nil, &result) }()
	<-running
	closed := make(chan error, 1)
	go func() { closed <- server.Close() }()
	<-server.closing
	close(end)
	if err := errors.Join(<-done, <-closed); err != nil || result != "saved" {
		t.Errorf("%q, %v", result, err)
	}
	if err := (Client{Answer: refuse}).Call(t.Context(), path, "op", nil, nil); err == nil {
		t.Error("a closed server still serves")
	}
}

// TestCloseCancels: an operation that goes on is canceled, and may undo what it
// did. It takes the grace of a closing server.
func TestCloseCancels(t *testing.T) {
	path, server := serve(t, func(ctx context.Context, s *Session, _ json.RawMessage) (any, error) {
		s.Tell("running")
		<-ctx.Done()
		_, err := s.Ask(context.Background(), "undo", nil, nil, 0)
		return nil, errors.Join(err, context.Cause(ctx))
	})
	running := make(chan struct{})
	done := make(chan error, 1)
	client := Client{
		Event:  func(json.RawMessage) { close(running) },
		Answer: func(context.Context, string, json.RawMessage) (any, []*os.File, error) { return nil, nil, nil },
	}
	go func() { done <- client.Call(t.Context(), path, "op", nil, nil) }()
	<-running
	if err := server.Close(); err != nil {
		t.Error(err)
	}
	if err := <-done; err == nil || !strings.Contains(err.Error(), ErrEnding.Error()) {
		t.Errorf("%v", err)
	}
}

// TestManyClients: more clients than are served at once wait for their turn.
func TestManyClients(t *testing.T) {
	path, _ := serve(t, func(context.Context, *Session, json.RawMessage) (any, error) { return nil, nil })
	var clients sync.WaitGroup
	for range 4 * maxConnections {
		clients.Go(func() {
			if err := (Client{Answer: refuse}).Call(t.Context(), path, "op", nil, nil); err != nil {
				t.Error(err)
			}
		})
	}
	clients.Wait()
}

func TestCheckRegular(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, test := range []struct {
		path        string
		flags, want int
		ok          bool
	}{
		{path, os.O_RDWR, unix.O_RDWR, true},
		{path, os.O_RDONLY, unix.O_RDONLY, true},
		{path, os.O_RDONLY, unix.O_RDWR, false},
		{path, os.O_RDWR, unix.O_RDONLY, false},
		{path, os.O_WRONLY, unix.O_RDWR, false},
		{path, os.O_RDWR | os.O_APPEND, unix.O_RDWR, false},
		{path, os.O_RDWR, unix.O_RDWR | unix.O_DIRECT, false},
		{os.DevNull, os.O_RDWR, unix.O_RDWR, false},
		{filepath.Dir(path), os.O_RDONLY, unix.O_RDONLY, false},
	} {
		f, err := os.OpenFile(test.path, test.flags, 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := CheckRegular(f, test.want); (err == nil) != test.ok {
			t.Errorf("%s with %#x instead of %#x: %v", test.path, test.flags, test.want, err)
		}
		_ = f.Close()
	}
}
