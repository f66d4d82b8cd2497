package api

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func TestRemote(t *testing.T) {
	m := newFake()
	s, path := serve(t, m)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket: %v, %v", st.Mode(), err)
	}
	r, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	ctx := t.Context()

	info, err := r.Info(ctx)
	if diff := cmp.Diff(m.Info(), info); diff != "" || err != nil {
		t.Error(err, diff)
	}
	stats, err := r.Stats(ctx)
	want, _ := m.Stats()
	want.Devices[1].Counters = map[string]uint64{}
	if diff := cmp.Diff(want, stats); diff != "" || err != nil {
		t.Error(err, diff)
	}
	for _, q := range []MemoryQuery{{}, {Full: true}, {Pause: true}, {Full: true, Pause: true}} {
		memory, err := r.Memory(ctx, q)
		if want := q.mode(); err != nil || memory.Mode != want || memory.Exact != q.Pause || memory.Layers == nil || memory.Frames.Reasons == nil {
			t.Errorf("%+v: %+v, %v", q, memory, err)
		}
		pages, err := r.MemoryMap(ctx, q)
		if want := q.mode(); err != nil || pages.Mode != want || pages.Exact != q.Pause || len(pages.Pages) != 512 || pages.Frames[0] != 1 {
			t.Errorf("%+v: %+v, %v", q, pages, err)
		}
	}
	if b, err := r.Balloon(ctx); err != nil || b.ActualBytes != 1 || b.Guest == nil {
		t.Errorf("%+v, %v", b, err)
	}
	if f, err := r.Forwards(ctx); err != nil || len(f) != 1 || f[0].GuestPort != 8080 {
		t.Errorf("%+v, %v", f, err)
	}
	if text, err := r.Metrics(ctx); err != nil || text != formatMetrics(m.Info(), want) {
		t.Errorf("%q, %v", text, err)
	}
	m.calls = nil
	for _, f := range []func(context.Context) error{r.Pause, r.Resume, r.TakeBack, r.PowerButton,
		func(ctx context.Context) error { return r.SetBalloon(ctx, 4096) },
		func(ctx context.Context) error { return r.ResizeDisk(ctx, 1, 8192) },
		func(ctx context.Context) error { return r.ResizeConsole(ctx, 80, 25) },
	} {
		if err := f(ctx); err != nil {
			t.Error(err)
		}
	}
	if diff := cmp.Diff([]string{"pause", "resume", "take-back", "power-button", "set-balloon 4096", "resize-disk 1 8192", "resize 80x25"}, m.calls); diff != "" {
		t.Error(diff)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := r.Info(ctx); err == nil {
		t.Error("a closed server answers")
	}
}

func TestRemoteErrors(t *testing.T) {
	m := newFake()
	_, path := serve(t, m)
	r, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	for _, test := range []struct {
		fail   error
		status int
		is     error
	}{
		{fmt.Errorf("pause: %w", ErrWrongState), 409, ErrWrongState},
		{ErrNotSupported, 501, ErrNotSupported},
		{fmt.Errorf("resize: %w", Mistake(errors.New("a disk of 3 bytes"))), 400, nil},
		{errors.New("disk\nbroke"), 500, nil},
	} {
		m.fail = test.fail
		err := r.Pause(t.Context())
		var e *RequestError
		if !errors.As(err, &e) || e.Status != test.status || test.is != nil && !errors.Is(err, test.is) {
			t.Errorf("%v came out as %v", test.fail, err)
		}
		for name, f := range map[string]func() error{
			"stats":     func() error { _, err := r.Stats(t.Context()); return err },
			"memory":    func() error { _, err := r.Memory(t.Context(), MemoryQuery{}); return err },
			"map":       func() error { _, err := r.MemoryMap(t.Context(), MemoryQuery{}); return err },
			"balloon":   func() error { _, err := r.Balloon(t.Context()); return err },
			"metrics":   func() error { _, err := r.Metrics(t.Context()); return err },
			"resume":    func() error { return r.Resume(t.Context()) },
			"take back": func() error { return r.TakeBack(t.Context()) },
			"button":    func() error { return r.PowerButton(t.Context()) },
		} {
			if err := f(); !errors.As(err, &e) || e.Status != test.status {
				t.Errorf("%s: %v came out as %v", name, test.fail, err)
			}
		}
	}
	m.fail = nil
	var e *RequestError
	if err := r.SetBalloon(t.Context(), 2<<30); !errors.As(err, &e) || e.Body.Code != BadRequest {
		t.Errorf("a balloon larger than the machine: %v", err)
	}
	if err := r.Stop(t.Context(), 2*time.Hour); !errors.As(err, &e) || e.Body.Code != BadRequest {
		t.Errorf("an endless grace: %v", err)
	}
	if err := r.Stop(t.Context(), -time.Second); !errors.As(err, &e) || e.Body.Code != BadRequest {
		t.Errorf("a negative grace: %v", err)
	}
	nobody, err := Dial(path + ".absent")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := nobody.Info(t.Context()); err == nil {
		t.Error("no socket, no error")
	}
}

func TestStop(t *testing.T) {
	m := newFake()
	_, path := serve(t, m)
	r, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	// A second stop joins the first; one without grace kills.
	for _, grace := range []time.Duration{time.Minute, time.Minute, 0} {
		if err := r.Stop(t.Context(), grace); err != nil {
			t.Fatal(err)
		}
	}
	<-m.ended
	m.mu.Lock()
	defer m.mu.Unlock()
	stops, kills := 0, 0
	for _, c := range m.calls {
		switch c {
		case "stop 1m0s":
			stops++
		case "kill":
			kills++
		}
	}
	if stops != 1 || kills != 1 {
		t.Errorf("calls: %v", m.calls)
	}
}

// TestCloseDuringStop checks that a server can be closed while the machine does
// not end: goleak sees the goroutine if it is not joined.
func TestCloseDuringStop(t *testing.T) {
	m := newFake()
	s, path := serve(t, m)
	r, err := Dial(path)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if err := r.Stop(t.Context(), time.Hour); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}

func TestConnectionLimit(t *testing.T) {
	m := newFake()
	_, path := serve(t, m)
	var conns []net.Conn
	defer func() {
		for _, c := range conns {
			_ = c.Close()
		}
	}()
	for range maxConnections {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		conns = append(conns, c)
		if _, err := fmt.Fprint(c, "GET /v1/vm HTTP/1.1\r\nHost: d\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if _, err := io.ReadFull(c, make([]byte, 12)); err != nil {
			t.Fatal(err)
		}
	}
	// The next one waits in the backlog until another is closed.
	extra, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	if _, err := fmt.Fprint(extra, "GET /v1/vm HTTP/1.0\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	_ = conns[0].Close()
	if _, err := io.ReadAll(extra); err != nil {
		t.Error(err)
	}
}

// TestSlowMemory: a look at memory outlives the time that other requests get,
// and ends when the client goes away.
func TestSlowMemory(t *testing.T) {
	const limit = 20 * time.Millisecond
	m := newFake()
	left := make(chan error, 1)
	m.slow = func(ctx context.Context) error {
		select {
		case <-ctx.Done():
			left <- ctx.Err()
			return ctx.Err()
		case <-time.After(10 * limit):
			return nil
		}
	}
	dir, err := os.MkdirTemp("/tmp", "ditto-api-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	l, err := Listen(dir + "/api.sock")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(m, slog.New(slog.DiscardHandler))
	s.http.ReadTimeout, s.http.WriteTimeout = limit, limit
	s.Serve(l)
	defer s.Close()
	r, err := Dial(dir + "/api.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, err := r.Memory(t.Context(), MemoryQuery{Full: true}); err != nil {
		t.Error(err)
	}

	m.slow = func(ctx context.Context) error {
		<-ctx.Done()
		left <- ctx.Err()
		return ctx.Err()
	}
	ctx, cancel := context.WithTimeout(t.Context(), limit)
	defer cancel()
	if _, err := r.Memory(ctx, MemoryQuery{Full: true}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a client that went away: %v", err)
	}
	if err := <-left; err == nil {
		t.Error("the machine still looks")
	}
}
