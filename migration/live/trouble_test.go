package live

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// TestRecordFails: what cannot be recorded does not run, and the source takes the
// VM back.
func TestRecordFails(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 1<<20)
	vm.startFirst()
	h := &fakeHost{w: w}
	// Who is asked later is the parent, which knows that it recorded nothing.
	n, recorded := loopback(t), make(chan struct{})
	dial, dials := n.dial, 0
	n.dial = func(ctx context.Context) (net.Conn, error) {
		if dials++; dials == 1 {
			return dial(ctx)
		}
		<-recorded
		here, there := net.Pipe()
		go func() { _ = AnswerOutcome(there, time.Second, func(Token) Outcome { return OutcomeNever }) }()
		return here, nil
	}
	e := move(t.Context(), vm, h, n, Options{}, ReceiveOptions{Committed: func(Token) error {
		defer close(recorded)
		return errors.New("the pipe is gone")
	}})
	if e.recvErr == nil || !strings.Contains(e.recvErr.Error(), "the pipe is gone") || e.result.Committed || h.runs() || h.abandoned != 1 {
		t.Errorf("destination: %v, %+v", e.recvErr, e.result)
	}
	if e.sendErr == nil || !vm.runs() || e.report.Outcome != OutcomeNever {
		t.Errorf("source: %v, %+v", e.sendErr, e.report)
	}
}

// TestStrangers: who is no source does not end the receiver, and cannot keep the
// next one out.
func TestStrangers(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 1<<20)
	vm.startFirst()
	h := &fakeHost{w: w}
	n := loopback(t)
	old := wire.Preamble{Min: 7, Max: 9, Role: wire.RoleControl}.Append(nil)
	future := wire.Preamble{Min: wire.MinVersion, Max: wire.Version, Role: wire.RolePull}.Append(nil)
	data := wire.Preamble{Min: wire.MinVersion, Max: wire.Version, Role: wire.RoleData}.Append(nil)
	control := wire.Preamble{Min: wire.MinVersion, Max: wire.Version, Role: wire.RoleControl}.Append(nil)
	hello := wire.Append(control, &wire.Hello{Digests: wire.DigestXXH3})
	greetings := map[string][]byte{
		"nothing": {}, "one byte": {0x93}, "http": []byte("GET / HTTP/1.1\r\nHost: there\r\n\r\n"), "version": old,
		"pull": future, "data": data, "control": control, "garbage after control": append(append([]byte{}, control...), strings.Repeat("x", 100)...),
		"no offer": hello, "offer of nothing": wire.Append(append([]byte{}, hello...), &wire.Offer{JSON: []byte("{}")}),
		"offer that is none": wire.Append(append([]byte{}, hello...), &wire.Offer{JSON: []byte("[")}),
	}
	dial, strangers := n.dial, make(chan struct{})
	go func() {
		defer close(strangers)
		for name, b := range greetings {
			c, err := dial(context.Background())
			if err != nil {
				t.Error(err)
				return
			}
			_, _ = c.Write(b)
			_ = c.SetReadDeadline(time.Now().Add(5 * time.Second))
			// It is closed, whatever it is told before.
			if _, err := io.Copy(io.Discard, c); err != nil && strings.Contains(err.Error(), "timeout") {
				t.Errorf("%s: still open", name)
			}
			_ = c.Close()
		}
	}()
	n.dial = func(ctx context.Context) (net.Conn, error) {
		<-strangers
		return dial(ctx)
	}
	e := move(t.Context(), vm, h, n, Options{Connections: 1}, ReceiveOptions{HelloLimit: 200 * time.Millisecond})
	if e.sendErr != nil || e.recvErr != nil || !h.runs() {
		t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
	}
}

// TestBusy: a second source is told so, a question is answered.
func TestBusy(t *testing.T) {
	w := newWorld(t, 10)
	vm, second := newFakeVM(w, 1<<20), newFakeVM(w, 1<<20)
	vm.startFirst()
	h := &fakeHost{w: w}
	n := loopback(t)
	vm.names = func() error {
		_, err := Send(t.Context(), second, n.dial, Options{})
		var peer *PeerError
		if !errors.As(err, &peer) || !strings.Contains(peer.Reason, "another VM is being received") {
			t.Errorf("the second source hears %v", err)
		}
		for token, want := range map[Token]Outcome{{1}: OutcomeCommitted, {2}: OutcomeUnknown} {
			if got, err := AskOutcome(t.Context(), n.dial, token); err != nil || got != want {
				t.Errorf("of %s: %s, %v", token, got, err)
			}
		}
		return nil
	}
	e := move(t.Context(), vm, h, n, Options{}, ReceiveOptions{Outcome: func(token Token) Outcome {
		if token == (Token{1}) {
			return OutcomeCommitted
		}
		return OutcomeUnknown
	}})
	if e.sendErr != nil || e.recvErr != nil {
		t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
	}
}

// TestNobody: a source that finds only the parent is told that nobody receives.
func TestNobody(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 1<<20)
	vm.startFirst()
	dial := func(context.Context) (net.Conn, error) {
		here, there := net.Pipe()
		go func() { _ = AnswerOutcome(there, time.Second, func(Token) Outcome { return OutcomeNever }) }()
		return here, nil
	}
	_, err := Send(t.Context(), vm, dial, Options{})
	var peer *PeerError
	if !errors.As(err, &peer) || !strings.Contains(err.Error(), "nobody receives") || !vm.runs() {
		t.Errorf("it hears %v", err)
	}
	if got, err := AskOutcome(t.Context(), dial, Token{}); err != nil || got != OutcomeNever {
		t.Errorf("%s, %v", got, err)
	}
}

// TestHostTrouble: what fails at the destination is told at the source, which
// goes on.
func TestHostTrouble(t *testing.T) {
	for name, test := range map[string]struct {
		h    *fakeHost
		want string
	}{
		"construct":      {&fakeHost{construct: errors.New("disk /x is locked by somebody")}, "disk /x is locked"},
		"other memory":   {&fakeHost{size: 2 << 20}, "memory was offered at"},
		"run (too late)": {&fakeHost{run: errors.New("KVM_RUN: EFAULT")}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 10)
			vm := newFakeVM(w, 1<<20)
			vm.startFirst()
			h := test.h
			h.w = w
			e := move(t.Context(), vm, h, loopback(t), Options{Connections: 1}, ReceiveOptions{})
			if test.want == "" {
				if !e.result.Committed || e.recvErr == nil || e.sendErr != nil || vm.runs() {
					t.Errorf("%+v, %v, %v", e.result, e.recvErr, e.sendErr)
				}
				return
			}
			if e.sendErr == nil || !strings.Contains(e.sendErr.Error(), test.want) || !vm.runs() || h.runs() {
				t.Errorf("the source hears %v", e.sendErr)
			}
		})
	}
}

// TestTimeout: what does not converge ends as was told.
func TestTimeout(t *testing.T) {
	for _, policy := range []TimeoutPolicy{TimeoutAbort, TimeoutStop} {
		t.Run(string(policy), func(t *testing.T) {
			w := newWorld(t, 100)
			vm := newFakeVM(w, 8<<20)
			vm.guest = writer(1, 10*time.Microsecond)
			vm.startFirst()
			h := &fakeHost{w: w}
			sameAtSwitch(vm, h)
			o := Options{Connections: 1, Downtime: 1, Timeout: 100 * time.Millisecond, OnTimeout: policy}
			e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{})
			var late *TimeoutError
			switch {
			case policy == TimeoutAbort && (!errors.As(e.sendErr, &late) || !errors.Is(e.sendErr, ErrTimeout) || !vm.runs() || late.Expected <= 0):
				t.Errorf("%v", e.sendErr)
			case policy == TimeoutStop && (e.sendErr != nil || e.report.Mode != "stop" || !h.runs()):
				t.Errorf("%v, %+v", e.sendErr, e.report)
			}
			if e.report.Rounds < 2 || e.report.Throttle == 0 || vm.throttled.Load() == 0 {
				t.Errorf("%d rounds, throttled by %d %%", e.report.Rounds, e.report.Throttle)
			}
		})
	}
}

// TestTimeoutInRound: the time can be over before memory was sent once.
func TestTimeoutInRound(t *testing.T) {
	for _, policy := range []TimeoutPolicy{TimeoutAbort, TimeoutStop, TimeoutPostcopy} {
		t.Run(string(policy), func(t *testing.T) {
			w := newWorld(t, 100)
			vm := newFakeVM(w, 16<<20)
			for i := range vm.hints {
				vm.write(vm.gfn(i).GPA(), []byte{1, byte(i)})
			}
			vm.guest = writer(1, 10*time.Microsecond)
			vm.startFirst()
			h := &fakeHost{w: w}
			sameAtSwitch(vm, h)
			o := Options{Connections: 1, Bandwidth: 8 << 20, Timeout: 200 * time.Millisecond, OnTimeout: policy}
			e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{Postcopy: true})
			if policy == TimeoutAbort {
				if !errors.Is(e.sendErr, ErrTimeout) || !vm.runs() {
					t.Errorf("%v", e.sendErr)
				}
			} else if e.sendErr != nil || !h.runs() {
				t.Errorf("%v", e.sendErr)
			}
			if policy == TimeoutPostcopy {
				pulled(t, vm, h)
			}
			if policy != TimeoutPostcopy && e.report.Total > 1500*time.Millisecond {
				t.Errorf("it took %v", e.report.Total)
			}
		})
	}
}

// TestThrottle: a guest that writes faster than pages are sent is slowed down
// until it may stand still for as long as was said.
func TestThrottle(t *testing.T) {
	w := newWorld(t, 100)
	vm := newFakeVM(w, 4<<20)
	for i := range vm.hints {
		vm.write(vm.gfn(i).GPA(), []byte{1})
	}
	vm.guest = func(ctx context.Context, vm *fakeVM) {
		// It writes 40 MiB/s, twice as much as is sent, and less when slowed down.
		for i, last := 0, time.Now(); ctx.Err() == nil; time.Sleep(time.Millisecond) {
			speed := 10 * time.Duration(100-vm.throttle.Load()) / 100 // pages a millisecond
			due := int(time.Since(last) * max(speed, 1) / time.Millisecond)
			last = time.Now()
			for range due {
				i++
				vm.write(vm.gfn((i*7919)%len(vm.hints)).GPA(), []byte{byte(i), 1})
			}
		}
	}
	vm.startFirst()
	h := &fakeHost{w: w}
	sameAtSwitch(vm, h)
	var expected time.Duration
	o := Options{Connections: 1, Bandwidth: 20 << 20, Downtime: 60 * time.Millisecond, Events: func(e Event) { expected = e.Expected }}
	e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{})
	if e.sendErr != nil || e.report.Throttle < firstThrottle || e.report.Expected > o.Downtime || expected == 0 {
		t.Errorf("%v, throttled by %d %%, expected %v", e.sendErr, e.report.Throttle, e.report.Expected)
	}
	if seconds := e.report.Total.Seconds(); float64(e.report.Sent.Total)/seconds > 1.3*float64(o.Bandwidth) {
		t.Errorf("%d bytes in %.1f s are more than %d a second", e.report.Sent.Total, seconds, o.Bandwidth)
	}
}

// TestDamage: bytes that change on their way are found out, as long as the
// transport is not trusted.
func TestDamage(t *testing.T) {
	w := newWorld(t)
	vm := newFakeVM(w, 4<<20)
	for i := range vm.hints {
		vm.write(vm.gfn(i).GPA(), []byte{1, byte(i), byte(i >> 8)})
	}
	vm.startFirst()
	h := &fakeHost{w: w}
	n := loopback(t)
	accept := n.accept
	n.accept = func(ctx context.Context) (net.Conn, error) {
		c, err := accept(ctx)
		if err != nil {
			return nil, err
		}
		return &damaged{Conn: c}, nil
	}
	e := move(t.Context(), vm, h, n, Options{}, ReceiveOptions{})
	if !errors.Is(e.recvErr, errDamaged) || e.sendErr == nil || !strings.Contains(e.sendErr.Error(), "damaged on their way") || !vm.runs() {
		t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
	}
}

// damaged changes one byte in the middle of pages.
type damaged struct {
	net.Conn
	read int
}

func (d *damaged) Read(p []byte) (int, error) {
	n, err := d.Conn.Read(p)
	if at := 1 << 20; d.read <= at && at < d.read+n {
		p[at-d.read]++
	}
	d.read += n
	return n, err
}

// TestVerifyFinds a page that changed although it should not have.
func TestVerifyFinds(t *testing.T) {
	w := newWorld(t)
	vm := newFakeVM(w, 4<<20)
	vm.startFirst()
	vm.collect = func(into *memory.PageSet) {
		if !vm.runs() { // in the pause; nobody tracks this write
			b, err := vm.mem.Writable(0x3000, 1)
			if err != nil {
				t.Error(err)
			}
			b[0]++
		}
	}
	h := &fakeHost{w: w}
	e := move(t.Context(), vm, h, loopback(t), Options{Verify: true}, ReceiveOptions{})
	if e.recvErr == nil || !strings.Contains(e.recvErr.Error(), "memory differs") || !vm.runs() {
		t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []Options{{Connections: -1}, {Connections: 65}, {Proof: "md5"}, {Compression: "gzip"}, {OnTimeout: "pray"}} {
		if _, err := Send(t.Context(), nil, nil, o); err == nil {
			t.Errorf("%+v is accepted", o)
		}
	}
}

func TestConvergence(t *testing.T) {
	c := convergence{perPage: 4096}
	round := func(pages uint64, took time.Duration, left uint64) {
		c.ended(sample{pages: pages, bytes: pages * 4096, took: took, left: left})
	}
	round(1<<20, 10*time.Second, 1<<19) // 2^20 pages in 10 s, half of them left
	if got := c.expected(); got < 5*time.Second || got > 6*time.Second {
		t.Errorf("expected %v", got)
	}
	for i, want := range []int{0, 20, 20, 30, 30, 40} {
		round(1<<19, 5*time.Second, 1<<19)
		if got := c.slower(); got != want {
			t.Errorf("after %d rounds that did not help: %d %%, not %d", i+1, got, want)
		}
	}
	round(1<<19, 5*time.Second, 1<<17)
	if got := c.slower(); got != 40 {
		t.Errorf("after one that did: %d %%", got)
	}
	round(10, time.Second, 10) // too few to learn from
	if got := c.expected(); got > switchCost+time.Millisecond {
		t.Errorf("expected %v", got)
	}
	// Names are few bytes, and slow: that is no speed.
	named := convergence{perPage: 4096}
	named.ended(sample{pages: 1 << 17, bytes: minSample - 1, took: 2 * time.Second, left: 1 << 10})
	if got := named.expected(); got > switchCost+20*time.Millisecond {
		t.Errorf("expected %v after a round of names", got)
	}
}
