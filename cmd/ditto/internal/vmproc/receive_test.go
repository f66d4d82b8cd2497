package vmproc

import (
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/internal/migratetest"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
	"ditto.vm/vmm/sandbox"
)

// landing is a host that receives a machine.
type landing struct {
	t        *testing.T
	o        ReceiveOptions
	world    *migratetest.World
	source   *migratetest.Source
	arrival  *migratetest.Arrival
	machine  *fakeMachine
	listener *net.TCPListener
	signals  chan os.Signal
	orphaned chan struct{}
	events   chan ReceiveEvent
	ended    chan received
	steps    []string // what was done, in order
}

// arriving is a machine on its way.
type arriving struct {
	live.Arrival
	machine Machine
}

func (a arriving) Machine() Machine { return a.machine }

func newLanding(t *testing.T) *landing {
	t.Helper()
	l := &landing{
		t: t, world: migratetest.NewWorld(), machine: newFake(), signals: make(chan os.Signal, 2),
		orphaned: make(chan struct{}), events: make(chan ReceiveEvent, 1000), ended: make(chan received, 1),
	}
	var err error
	if l.source, err = migratetest.NewSource(l.world, "there", 1<<20); err != nil {
		t.Fatal(err)
	}
	l.arrival = migratetest.NewArrival(l.world, "here")
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l.listener = listener.(*net.TCPListener)
	r := newRegistry(t)
	outcomes, err := OpenOutcomes(filepath.Join(r.RunDir(), ".migrations"))
	if err != nil {
		t.Fatal(err)
	}
	l.o = ReceiveOptions{
		Options: Options{
			Registry: r, Version: "v", Signals: l.signals,
			Log: func(string) (*slog.Logger, error) { return slog.New(slog.NewTextHandler(t.Output(), nil)), nil },
			Sandbox: func(sandbox.Policy) (sandbox.Report, error) {
				l.steps = append(l.steps, "sandbox")
				return sandbox.Report{}, nil
			},
		},
		Configure: func(o *live.Offer) (config.Config, error) {
			cfg := config.Default()
			cfg.Name = o.Name
			return cfg, nil
		},
		Arrive: func(ctx context.Context, o live.Offer, cfg config.Config, s Surroundings) (Arriving, error) {
			var given config.Config
			if err := json.Unmarshal(o.Config, &given); err != nil || given.Name != cfg.Name {
				t.Errorf("the offer has another configuration: %s, %v", o.Config, err)
			}
			l.machine.cfg, l.machine.console = cfg, s.Console
			a, err := l.arrival.Prepare(ctx, o)
			return arriving{a, l.machine}, err
		},
		Accept: live.AcceptFrom(l.listener), Release: l.listener.Close, Outcomes: outcomes,
		Tell:     func(ev ReceiveEvent) { l.events <- ev },
		Orphaned: l.orphaned, FirstLog: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	t.Cleanup(func() { _ = l.source.Close() })
	return l
}

func (l *landing) receive() {
	go func() {
		code, err := Receive(context.Background(), l.o)
		l.ended <- received{live.Result{Received: uint64(code)}, err}
	}()
}

func (l *landing) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "tcp", l.listener.Addr().String())
}

func (l *landing) send() (live.Report, error) {
	return live.Send(l.t.Context(), l.source, l.dial, live.Options{Connections: 1, OutcomeLimit: time.Second})
}

// event waits for an event of a kind.
func (l *landing) event(kind string) ReceiveEvent {
	l.t.Helper()
	for {
		select {
		case ev := <-l.events:
			if ev.Event == kind {
				return ev
			}
		case <-time.After(time.Minute):
			l.t.Fatalf("no event %q", kind)
		}
	}
}

func (l *landing) runs(want string) {
	l.t.Helper()
	if who, err := l.world.Runs(); who != want || err != nil {
		l.t.Errorf("it runs at %q, want %q; %v", who, want, err)
	}
}

// TestReceive: the process becomes the machine, has its rights dropped before the
// commit point, and is found by others.
func TestReceive(t *testing.T) {
	l := newLanding(t)
	l.receive()
	report, err := l.send()
	if err != nil {
		t.Fatal(err)
	}
	if ev := l.event(ReceiveOffered); ev.Name != "vm" {
		t.Errorf("%+v", ev)
	}
	ev := l.event(ReceiveArrived)
	if ev.Name != "vm" || ev.PID != os.Getpid() || ev.Token != report.Token.String() || !ev.Result.Committed {
		t.Errorf("%+v", ev)
	}
	l.runs("here")
	if strings.Join(l.steps, " ") != "sandbox" {
		t.Errorf("%v", l.steps)
	}
	if got := l.o.Outcomes.Lookup(report.Token); got != live.OutcomeCommitted {
		t.Errorf("outcome %v", got)
	}
	vm, err := l.o.Registry.Find("vm")
	if err != nil || !vm.Incoming || vm.Started.IsZero() {
		t.Errorf("%+v, %v", vm, err)
	}
	l.machine.end <- Exit{Reason: "poweroff"}
	if e := <-l.ended; e.err != nil || e.result.Received != exit.OK {
		t.Errorf("%+v", e)
	}
	if last, err := l.o.Registry.LastExit("vm"); err != nil || last.Reason != "poweroff" {
		t.Errorf("%+v, %v", last, err)
	}
	if err := l.arrival.Stop(); err != nil {
		t.Error(err)
	}
	if !l.machine.closed {
		t.Error("the machine is not closed")
	}
}

// TestReceiveRefused: nothing of a machine that does not fit is left, how an
// earlier one of its name ended stays known, and the source learns why.
func TestReceiveRefused(t *testing.T) {
	broken := errors.New("does not fit")
	for name, test := range map[string]struct {
		change func(l *landing)
		want   string
		code   int
	}{
		"configuration": {func(l *landing) {
			l.o.Configure = func(*live.Offer) (config.Config, error) {
				return config.Config{}, exit.Errorf(exit.Disk, "there is no disk 7")
			}
		}, "there is no disk 7", exit.Disk},
		"name": {func(l *landing) {
			lease, err := l.o.Registry.Acquire("vm")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = lease.Release() })
		}, "choose another name", exit.NameInUse},
		"prepare": {func(l *landing) {
			l.o.Arrive = func(context.Context, live.Offer, config.Config, Surroundings) (Arriving, error) { return nil, broken }
		}, "does not fit", exit.Migration},
		"construct": {func(l *landing) { l.arrival.ConstructErr = broken }, "does not fit", exit.Migration},
		"sandbox": {func(l *landing) {
			l.o.Sandbox = func(sandbox.Policy) (sandbox.Report, error) { return sandbox.Report{}, broken }
		}, "--sandbox=off", exit.Sandbox},
	} {
		t.Run(name, func(t *testing.T) {
			l := newLanding(t)
			before, err := l.o.Registry.Acquire("vm")
			if err != nil {
				t.Fatal(err)
			}
			record, err := before.OpenExit()
			if err == nil {
				err = errors.Join(registry.WriteExit(record, registry.ExitRecord{Reason: "migrated", Where: "x"}), record.Close(), before.Release())
			}
			if err != nil {
				t.Fatal(err)
			}
			test.change(l)
			l.receive()
			report, err := l.send()
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("the source hears %v, want %q", err, test.want)
			}
			if e := <-l.ended; e.err == nil || Classify(e.err) != test.code || !strings.Contains(e.err.Error(), test.want) {
				t.Errorf("%+v, code %d, want %d", e, Classify(e.err), test.code)
			}
			if ev := l.event(ReceiveFailed); !strings.Contains(ev.Error, test.want) || ev.Code != test.code || ev.Canceled {
				t.Errorf("%+v", ev)
			}
			l.runs("there")
			if got := l.o.Outcomes.Lookup(report.Token); got != live.OutcomeNever {
				t.Errorf("outcome %v", got)
			}
			if name != "name" {
				if _, err := l.o.Registry.Find("vm"); !errors.Is(err, registry.ErrNotRunning) {
					t.Errorf("%v", err)
				}
				if last, err := l.o.Registry.LastExit("vm"); err != nil || last.Where != "x" {
					t.Errorf("how the last one ended is lost: %+v, %v", last, err)
				}
			}
		})
	}
}

// TestReceiveCanceled: who waits can end it, and one that nobody waits for ends
// unless a machine is on its way.
func TestReceiveCanceled(t *testing.T) {
	l := newLanding(t)
	l.receive()
	l.signals <- unix.SIGTERM
	if e := <-l.ended; !errors.Is(e.err, context.Canceled) {
		t.Errorf("%v", e.err)
	}
	if ev := l.event(ReceiveFailed); !ev.Canceled {
		t.Errorf("%+v", ev)
	}

	l = newLanding(t)
	wish := make(chan struct{})
	l.o.Cancel = wish
	l.receive()
	close(wish)
	if e := <-l.ended; !errors.Is(e.err, context.Canceled) {
		t.Errorf("%v", e.err)
	}

	l = newLanding(t)
	l.receive()
	close(l.orphaned)
	if e := <-l.ended; !errors.Is(e.err, context.Canceled) {
		t.Errorf("%v", e.err)
	}

	l = newLanding(t)
	arrive := l.o.Arrive
	l.o.Arrive = func(ctx context.Context, o live.Offer, cfg config.Config, s Surroundings) (Arriving, error) {
		close(l.orphaned)
		return arrive(ctx, o, cfg, s)
	}
	l.receive()
	if _, err := l.send(); err != nil {
		t.Error(err)
	}
	l.event(ReceiveArrived)
	l.runs("here")
	l.machine.end <- Exit{Reason: "poweroff"}
	<-l.ended
	_ = l.arrival.Stop()
}

// TestReceiveLost: a machine whose guest cannot be let run after the commit is
// not said never to have been.
func TestReceiveLost(t *testing.T) {
	l := newLanding(t)
	l.arrival.RunErr = errors.New("broken")
	l.receive()
	report, err := l.send()
	if err != nil && !strings.Contains(err.Error(), "broken") {
		t.Errorf("%v", err)
	}
	e := <-l.ended
	if e.err == nil || !strings.Contains(e.err.Error(), "broken") {
		t.Errorf("%+v", e)
	}
	if ev := l.event(ReceiveFailed); !ev.Result.Committed {
		t.Errorf("%+v", ev)
	}
	if got := l.o.Outcomes.Lookup(report.Token); got != live.OutcomeCommitted {
		t.Errorf("outcome %v", got)
	}
	l.runs("")
	_ = l.arrival.Stop()
}
