package remotemigrate

import (
	"context"
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

	"ditto.vm/internal/migratetest"
	"ditto.vm/migration/live"
	"ditto.vm/migration/pki"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/lend"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// scene is a machine at its source, whose process serves operations.
type scene struct {
	t         *testing.T
	world     *migratetest.World
	source    *migratetest.Source
	departure *Departure
	socket    string
	listener  *net.TCPListener
	server    *lend.Server
}

func newScene(t *testing.T) *scene {
	t.Helper()
	s := &scene{t: t, world: migratetest.NewWorld()}
	var err error
	if s.source, err = migratetest.NewSource(s.world, "here", 1<<20); err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	s.departure = NewDeparture(func() live.SourceVM { return s.source }, log)
	dir, err := os.MkdirTemp("/tmp", "ditto-migrate-")
	if err != nil {
		t.Fatal(err)
	}
	s.socket = filepath.Join(dir, "ops.sock")
	l, err := lend.Listen(s.socket)
	if err != nil {
		t.Fatal(err)
	}
	s.server = lend.NewServer(Operations(s.departure), Kinds(), log)
	s.server.Serve(l)
	s.listen("127.0.0.1:0")
	t.Cleanup(func() {
		if err := errors.Join(s.server.Close(), s.source.Close(), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
		_ = s.listener.Close()
	})
	return s
}

func (s *scene) listen(address string) {
	s.t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		s.t.Fatal(err)
	}
	s.listener = l.(*net.TCPListener)
}

// receive receives once.
func (s *scene) receive(a *migratetest.Arrival, accept live.Accepter, o live.ReceiveOptions) <-chan error {
	done := make(chan error, 1)
	go func() {
		_, err := live.Receive(s.t.Context(), a, accept, o)
		done <- err
	}()
	return done
}

func (s *scene) dial(ctx context.Context) (*os.File, error) {
	var d net.Dialer
	c, err := d.DialContext(ctx, "tcp", s.listener.Addr().String())
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.(*net.TCPConn).File()
}

// runs checks where the guest runs.
func (s *scene) runs(want string) {
	s.t.Helper()
	if who, err := s.world.Runs(); who != want || err != nil {
		s.t.Errorf("it runs at %q, want %q; %v", who, want, err)
	}
}

func options() Options { return Options{Where: "tcp://there", Connections: 2} }

func TestMigrate(t *testing.T) {
	s := newScene(t)
	a := migratetest.NewArrival(s.world, "there")
	done := s.receive(a, live.AcceptFrom(s.listener), live.ReceiveOptions{})
	var mu sync.Mutex
	var phases []live.Phase
	report, err := Call(t.Context(), s.socket, s.dial, options(), func(e live.Event) {
		mu.Lock()
		defer mu.Unlock()
		phases = append(phases, e.Phase)
	})
	if err != nil || report.Outcome != live.OutcomeCommitted || report.Pages.Raw != 256 || report.Where != "tcp://there" {
		t.Errorf("%+v, %v", report, err)
	}
	if err := <-done; err != nil {
		t.Error(err)
	}
	s.runs("there")
	mu.Lock()
	defer mu.Unlock()
	if len(phases) == 0 || phases[len(phases)-1] != live.PhaseDone {
		t.Errorf("%v", phases)
	}
	if where := <-s.source.Gone; where != "tcp://there" || s.departure.Gone() != where {
		t.Errorf("%q", where)
	}
	if err := a.Stop(); err != nil {
		t.Error(err)
	}
}

// credentials of two hosts and a stranger.
func credentials(t *testing.T, host string, trusts string) pki.Credentials {
	t.Helper()
	c, err := pki.Load(filepath.Join(host, "host.crt"), filepath.Join(host, "host.key"), filepath.Join(trusts, pki.CACert))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func newAuthority(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := pki.Init(dir, "test", pki.DefaultCALife); err != nil {
		t.Fatal(err)
	}
	if _, _, err := pki.Host(dir, "host", []string{"127.0.0.1"}, pki.DefaultHostLife); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestTLS: over TLS it goes to who can show that it is the one, and to nobody
// else.
func TestTLS(t *testing.T) {
	ours, theirs := newAuthority(t), newAuthority(t)
	for _, test := range []struct {
		name           string
		source, server pki.Credentials
		serverName     string
		want           string
	}{
		{"good", credentials(t, ours, ours), credentials(t, ours, ours), "127.0.0.1", ""},
		{"good by name", credentials(t, ours, ours), credentials(t, ours, ours), "host", ""},
		{"another host", credentials(t, ours, ours), credentials(t, ours, ours), "elsewhere", "is for another host"},
		{"a stranger receives", credentials(t, ours, ours), credentials(t, theirs, ours), "host", "not signed by an authority of --tls-ca"},
		{"a stranger sends", credentials(t, theirs, ours), credentials(t, ours, ours), "host", "does not know the authority"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			server, err := test.server.Server()
			if err != nil {
				t.Fatal(err)
			}
			a := migratetest.NewArrival(s.world, "there")
			plain := live.AcceptFrom(s.listener)
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := live.Receive(ctx, a, func(ctx context.Context) (net.Conn, error) {
					c, err := plain(ctx)
					if err != nil {
						return nil, err
					}
					return tlsServer(c, server), nil
				}, live.ReceiveOptions{})
				done <- err
			}()
			o := options()
			o.TLS = &TLS{test.source, test.serverName}
			_, err = Call(t.Context(), s.socket, s.dial, o, nil)
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) || !errors.Is(err, pki.ErrTLS) {
					t.Errorf("%v, want %q", err, test.want)
				}
				s.runs("here")
				cancel()
				<-done
				return
			}
			if err := errors.Join(err, <-done); err != nil {
				t.Fatal(err)
			}
			s.runs("there")
			if err := a.Stop(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFailures: before the commit point the machine runs on, and the client hears
// why, whatever it is.
func TestFailures(t *testing.T) {
	full := errors.New("no room here")
	for _, test := range []struct {
		name    string
		arrival func(a *migratetest.Arrival)
		options live.ReceiveOptions
		dial    error
		is      error
		want    string
	}{
		{"refused", nil, live.ReceiveOptions{Begin: func(live.Token) error { return full }}, nil, ErrRefused, "no room here"},
		{"not constructed", func(a *migratetest.Arrival) { a.ConstructErr = full }, live.ReceiveOptions{}, nil, nil, "no room here"},
		{"nobody there", nil, live.ReceiveOptions{}, full, ErrConnect, "no room here"},
	} {
		t.Run(test.name, func(t *testing.T) {
			s := newScene(t)
			a := migratetest.NewArrival(s.world, "there")
			if test.arrival != nil {
				test.arrival(a)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			go func() {
				_, err := live.Receive(ctx, a, live.AcceptFrom(s.listener), test.options)
				done <- err
			}()
			dial := s.dial
			if test.dial != nil {
				dial = func(context.Context) (*os.File, error) { return nil, test.dial }
			}
			_, err := Call(t.Context(), s.socket, dial, options(), nil)
			if err == nil || !strings.Contains(err.Error(), test.want) || test.is != nil && !errors.Is(err, test.is) {
				t.Errorf("%v, want %q, %v", err, test.want, test.is)
			}
			cancel()
			if err := <-done; err == nil {
				t.Error("it was received")
			}
			s.runs("here")
			if status := s.departure.Status(); status != nil || s.departure.MayRun() != nil {
				t.Errorf("%+v", status)
			}
			if err := s.departure.TakeBack(t.Context()); !errors.Is(err, api.ErrWrongState) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestOne: a second migration is refused, and a cancel ends the first.
func TestOne(t *testing.T) {
	s := newScene(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	// A destination that says nothing at all.
	first := make(chan error, 1)
	connected := make(chan struct{})
	go func() {
		_, err := Call(ctx, s.socket, func(ctx context.Context) (*os.File, error) {
			defer close(connected)
			return s.dial(ctx)
		}, options(), nil)
		first <- err
	}()
	<-connected
	if _, err := Call(t.Context(), s.socket, s.dial, options(), nil); !errors.Is(err, ErrBusy) {
		t.Errorf("%v", err)
	}
	if err := s.departure.MayRun(); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("%v", err)
	}
	if status := s.departure.Status(); status == nil || status.Where != "tcp://there" {
		t.Errorf("%+v", status)
	}
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	s.runs("here")
}

// doubt brings about a migration whose outcome the source does not know: the
// destination goes away when the commit is on its way, and nobody answers.
func (s *scene) doubt(committed bool) (live.Token, *migratetest.Arrival) {
	s.t.Helper()
	a := migratetest.NewArrival(s.world, "there")
	var mu sync.Mutex
	var conns []net.Conn
	var token live.Token
	accept := live.AcceptFrom(s.listener)
	done := s.receive(a, func(ctx context.Context) (net.Conn, error) {
		c, err := accept(ctx)
		mu.Lock()
		defer mu.Unlock()
		if err == nil {
			conns = append(conns, c)
		}
		return c, err
	}, live.ReceiveOptions{Committed: func(t live.Token) error {
		mu.Lock()
		defer mu.Unlock()
		token = t
		_ = s.listener.Close()
		for _, c := range conns {
			_ = c.(*net.TCPConn).SetLinger(0)
			_ = c.Close()
		}
		if !committed {
			return errors.New("not committed")
		}
		return nil
	}})
	dial := func(ctx context.Context, _ bool) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "tcp", s.listener.Addr().String())
	}
	o := options().live()
	o.OutcomeLimit = 50 * time.Millisecond
	_, err := s.departure.Migrate(s.t.Context(), dial, o)
	var doubt *live.InDoubtError
	if !errors.As(err, &doubt) || !errors.Is(mark(err), ErrInDoubt) {
		s.t.Fatalf("%v", err)
	}
	if err := <-done; (err == nil) != committed {
		s.t.Fatalf("%v", err)
	}
	status := s.departure.Status()
	if status == nil || status.Phase != string(live.PhaseInDoubt) || status.Reason == "" {
		s.t.Errorf("%+v", status)
	}
	if err := s.departure.MayRun(); !errors.Is(err, api.ErrWrongState) || !strings.Contains(err.Error(), "--take-back") {
		s.t.Errorf("a machine in doubt may run: %v", err)
	}
	return token, a
}

// answer answers one question for an outcome.
func (s *scene) answer(outcome live.Outcome) {
	address := s.listener.Addr().String()
	s.listen(address)
	l := s.listener
	go func() {
		c, err := l.Accept()
		if err == nil {
			_ = live.AnswerOutcome(c, time.Minute, func(live.Token) live.Outcome { return outcome })
		}
	}()
}

// TestDoubt: a machine whose outcome is not known stands still until it is known
// or its user decides.
func TestDoubt(t *testing.T) {
	t.Run("committed", func(t *testing.T) {
		s := newScene(t)
		_, a := s.doubt(true)
		s.runs("there")
		s.answer(live.OutcomePending)
		if _, err := Call(t.Context(), s.socket, s.dial, options(), nil); !errors.Is(err, ErrInDoubt) {
			t.Errorf("%v", err)
		}
		if err := s.departure.TakeBack(t.Context()); err == nil || !strings.Contains(err.Error(), "in use") {
			t.Errorf("taken back from who has its disks: %v", err)
		}
		_ = s.listener.Close()
		s.answer(live.OutcomeCommitted)
		report, err := Call(t.Context(), s.socket, s.dial, options(), nil)
		if err != nil || report.Outcome != live.OutcomeCommitted || s.departure.Gone() != "tcp://there" {
			t.Errorf("%+v, %v", report, err)
		}
		s.runs("there")
		if err := a.Stop(); err != nil {
			t.Error(err)
		}
	})
	t.Run("never", func(t *testing.T) {
		s := newScene(t)
		_, _ = s.doubt(false)
		s.runs("")
		s.answer(live.OutcomeNever)
		// It runs again, and is sent again, to nobody now.
		o := options()
		o.Stall = 100 * time.Millisecond
		if _, err := Call(t.Context(), s.socket, s.dial, o, nil); err == nil || errors.Is(err, ErrInDoubt) {
			t.Errorf("%v", err)
		}
		s.runs("here")
	})
	t.Run("taken back", func(t *testing.T) {
		s := newScene(t)
		_, _ = s.doubt(false)
		s.runs("")
		if err := s.departure.TakeBack(t.Context()); err != nil {
			t.Error(err)
		}
		s.runs("here")
		if s.departure.Status() != nil || s.departure.MayRun() != nil {
			t.Error("it is still in doubt")
		}
	})
}

// TestOptions: options that make no sense never arrive.
func TestOptions(t *testing.T) {
	dir := newAuthority(t)
	for _, test := range []struct {
		change func(*Options)
		want   string
	}{
		{func(*Options) {}, ""},
		{func(o *Options) { o.TLS = &TLS{credentials(t, dir, dir), "host"} }, ""},
		{func(o *Options) { o.Where = "" }, "destination"},
		{func(o *Options) { o.Where = "a\nb" }, "destination"},
		{func(o *Options) { o.Connections = 65 }, "connections"},
		{func(o *Options) { o.Proof = "md5" }, "proof"},
		{func(o *Options) { o.Compression = "lz4" }, "compression"},
		{func(o *Options) { o.OnTimeout = "panic" }, "on-timeout"},
		{func(o *Options) { o.Downtime = -1 }, "time"},
		{func(o *Options) { o.TLS = &TLS{} }, "certificate"},
		{func(o *Options) { o.TLS = &TLS{credentials(t, dir, dir), ""} }, "name of the peer"},
	} {
		o := options()
		test.change(&o)
		err := o.Check()
		if (err == nil) != (test.want == "") || err != nil && !strings.Contains(err.Error(), test.want) {
			t.Errorf("%+v: %v, want %q", o, err, test.want)
		}
	}
}

// TestHostile: what is lent must be a connected socket, and is asked for so often
// and no more.
func TestHostile(t *testing.T) {
	for name, open := range map[string]func() (*os.File, error){
		"a file":                 func() (*os.File, error) { return os.Open("/dev/null") },
		"one that is not joined": func() (*os.File, error) { return unconnected() },
	} {
		s := newScene(t)
		_, err := Call(t.Context(), s.socket, func(context.Context) (*os.File, error) { return open() }, options(), nil)
		if err == nil || !strings.Contains(err.Error(), "lent") {
			t.Errorf("%s: %v", name, err)
		}
		s.runs("here")
	}
	c := &connector{dial: func(context.Context) (*os.File, error) { return os.Open("/dev/null") }}
	if _, _, err := c.answer(t.Context(), "open", nil); !errors.Is(err, lend.ErrProtocol) {
		t.Errorf("%v", err)
	}
	for i := range MaxConnects + 1 {
		_, files, err := c.answer(t.Context(), askConnect, []byte(`{}`))
		for _, f := range files {
			_ = f.Close()
		}
		if (err == nil) != (i < MaxConnects) {
			t.Fatalf("connection %d: %v", i+1, err)
		}
	}
}

// TestAgain: who has canceled still asks for an outcome.
func TestAgain(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	c := &connector{dial: func(ctx context.Context) (*os.File, error) { return nil, ctx.Err() }}
	if _, _, err := c.answer(ctx, askConnect, []byte(`{}`)); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	c.dial = func(ctx context.Context) (*os.File, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		return os.Open("/dev/null")
	}
	_, files, err := c.answer(ctx, askConnect, []byte(`{"again":true}`))
	if err != nil {
		t.Fatal(err)
	}
	_ = files[0].Close()
}
