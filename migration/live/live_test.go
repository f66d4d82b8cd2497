package live

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/memory"
)

// TestMain lets nothing stay behind.
func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// network connects a source with a destination.
type network struct {
	dial   Dialer
	accept Accepter
}

// pipes connects by net.Pipe.
func pipes(testing.TB) network {
	conns := make(chan net.Conn)
	return network{
		dial: func(ctx context.Context) (net.Conn, error) {
			here, there := net.Pipe()
			select {
			case conns <- there:
				return here, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
		accept: func(ctx context.Context) (net.Conn, error) {
			select {
			case c := <-conns:
				return c, nil
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		},
	}
}

// loopback connects by TCP.
func loopback(t testing.TB) network {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return network{
		dial: func(ctx context.Context) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "tcp", l.Addr().String())
		},
		accept: AcceptFrom(l),
	}
}

// ended is how both sides ended.
type ended struct {
	report           Report
	result           Result
	sendErr, recvErr error
}

// move migrates a VM and waits for both sides.
func move(ctx context.Context, vm *fakeVM, h *fakeHost, n network, o Options, ro ReceiveOptions) ended {
	var e ended
	var wg sync.WaitGroup
	receiving, cancel := context.WithCancel(context.Background())
	defer cancel()
	wg.Go(func() { e.result, e.recvErr = Receive(receiving, h, n.accept, ro) })
	e.report, e.sendErr = Send(ctx, vm, n.dial, o)
	if e.sendErr != nil {
		// A destination that heard nothing of it waits for ever.
		time.AfterFunc(3*time.Second, cancel)
	}
	wg.Wait()
	return e
}

// sameAtSwitch lets a host compare memory at the switch-over.
func sameAtSwitch(vm *fakeVM, h *fakeHost) {
	h.same = func() {
		if d := differing(vm.w.t, vm.mem, h.mem); len(d) > 0 {
			vm.w.t.Errorf("%d pages differ at the switch-over, the first is %v", len(d), d[0])
		}
	}
}

func TestMove(t *testing.T) {
	for _, test := range []struct {
		name string
		net  func(testing.TB) network
		o    Options
	}{
		{"pipe", pipes, Options{}},
		{"pipe-trusted", pipes, Options{Trusted: true, Connections: 2}},
		{"tcp", loopback, Options{Connections: 4}},
		{"tcp-one", loopback, Options{}},
		{"tcp-trusted", loopback, Options{Connections: 3, Trusted: true}},
		{"zstd", loopback, Options{Connections: 2, Compression: Zstd}},
		{"zstd-trusted-one", loopback, Options{Trusted: true, Compression: Zstd}},
		{"blake3", loopback, Options{Connections: 1, Proof: ProofBLAKE3}},
		{"no-names", loopback, Options{Connections: 2, NoNames: true}},
		{"verify", loopback, Options{Connections: 2, Verify: true}},
	} {
		t.Run(test.name, func(t *testing.T) {
			w := newWorld(t, 3000, 1000)
			vm := newFakeVM(w, 32<<20)
			vm.fill(1)
			vm.guest = writer(2, 20*time.Microsecond)
			h := &fakeHost{w: w}
			sameAtSwitch(vm, h)
			vm.startFirst()
			test.o.Where = "there"
			e := move(t.Context(), vm, h, test.net(t), test.o, ReceiveOptions{})
			if e.sendErr != nil || e.recvErr != nil {
				t.Fatalf("source: %v, destination: %v", e.sendErr, e.recvErr)
			}
			if !h.running || vm.stopped != nil || w.runners.Load() != 1 || vm.left != "left to there" || vm.began {
				t.Errorf("destination running %v, source stopped %v, left %q", h.running, vm.stopped == nil, vm.left)
			}
			if e.report.Outcome != OutcomeCommitted || !e.result.Committed || e.report.Downtime <= 0 {
				t.Errorf("report %+v, result %+v", e.report, e.result)
			}
			p := e.report.Pages
			if named := p.Named > 0 && p.Duplicate > 0 && p.Asked > 0; named == test.o.NoNames {
				t.Errorf("pages %+v", p)
			}
			if sum := p.Zero + p.Named + p.Duplicate + p.Raw + p.Zstd; sum < e.report.RAM>>memory.PageShift {
				t.Errorf("%d pages of %d", sum, e.report.RAM>>memory.PageShift)
			}
			if len(h.sections) != len(vm.sections) || string(h.sections[0].Bytes) != "state" {
				t.Errorf("state %v", h.sections)
			}
			t.Logf("%+v", e.report)
		})
	}
}

// TestUntracked: a guest whose writes nobody tracks stands still before its first
// page is sent.
func TestUntracked(t *testing.T) {
	w := newWorld(t, 3000, 1000)
	vm := newFakeVM(w, 32<<20)
	vm.fill(1)
	vm.guest = writer(2, 20*time.Microsecond)
	vm.untracked = true
	vm.collect = func(*memory.PageSet) { t.Error("it was asked for what nobody knows") }
	h := &fakeHost{w: w}
	sameAtSwitch(vm, h)
	vm.startFirst()
	e := move(t.Context(), vm, h, loopback(t), Options{Connections: 2, Verify: true}, ReceiveOptions{})
	if e.sendErr != nil || e.recvErr != nil || !h.running {
		t.Fatalf("source: %v, destination: %v", e.sendErr, e.recvErr)
	}
	if p := e.report.Pages; e.report.Mode != "stop" || e.report.Rounds != 2 || p.Named == 0 || p.Asked == 0 {
		t.Errorf("report %+v", e.report)
	}
}

func TestRefused(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 1<<20)
	vm.startFirst()
	h := &fakeHost{w: w, refuse: errors.New("no avx512f here")}
	e := move(t.Context(), vm, h, loopback(t), Options{Connections: 2}, ReceiveOptions{})
	var peer *PeerError
	if !errors.As(e.sendErr, &peer) || !peer.Refused || peer.Reason != "no avx512f here" {
		t.Errorf("the source hears %v", e.sendErr)
	}
	if e.recvErr == nil || e.recvErr.Error() != "no avx512f here" {
		t.Errorf("the destination says %v", e.recvErr)
	}
	if vm.stopped == nil || vm.left != "" || vm.began || e.report.Outcome != OutcomeNever {
		t.Errorf("left %q, outcome %v", vm.left, e.report.Outcome)
	}
}

func TestCancel(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 64<<20)
	vm.fill(1)
	vm.startFirst()
	h := &fakeHost{w: w}
	ctx, cancel := context.WithCancel(t.Context())
	o := Options{Connections: 2, Bandwidth: 10 << 20, Events: func(e Event) {
		if e.Phase == PhaseCopy && e.Sent.Raw > 0 {
			cancel()
		}
	}}
	e := move(ctx, vm, h, loopback(t), o, ReceiveOptions{})
	if !errors.Is(e.sendErr, context.Canceled) {
		t.Errorf("source: %v", e.sendErr)
	}
	var peer *PeerError
	if !errors.As(e.recvErr, &peer) || peer.Reason != "it was canceled" {
		t.Errorf("destination: %v", e.recvErr)
	}
	if vm.stopped == nil || h.abandoned != 1 {
		t.Errorf("abandoned %d times", h.abandoned)
	}
}
