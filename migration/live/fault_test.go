package live

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"ditto.vm/migration/wire"
)

// victim is what a fault takes away.
type victim string

const (
	nobody        victim = ""
	killSource    victim = "source"
	killDest      victim = "destination"
	cutOnce       victim = "network"      // and it is back at once
	cutForGood    victim = "network-gone" // nobody hears of anybody any more
	silenceOnce   victim = "silence"      // bytes get lost, without a word, until the connections are given up
	silentForGood victim = "silence-lasting"
)

// point is a place in the stream of a run: so many frames passed on a stream, and
// some bytes of the next one, or none.
type point struct {
	stream string // control, data0, outcome; and > to the destination or < back
	frames int
	inside bool
}

func (p point) String() string {
	if p.inside {
		return fmt.Sprintf("%s%d+", p.stream, p.frames)
	}
	return fmt.Sprintf("%s%d", p.stream, p.frames)
}

// faulty is a network through which every frame is seen, and a fault can happen at
// one point. Signs of life, which come by the clock, are not counted.
type faulty struct {
	t      *testing.T
	victim victim
	at     point
	strike func() // what else happens at the fault

	accepted chan net.Conn
	// Receive has returned: its parent answers then.
	gone   chan struct{}
	lookup func(Token) Outcome
	wg     sync.WaitGroup

	mu     sync.Mutex
	struck bool
	silent chan struct{} // closed when the network is silent no more
	conns  []net.Conn
	frames map[string][]string // by stream: the types that passed
}

func newFaulty(t *testing.T, v victim, at point) *faulty {
	return &faulty{
		t: t, victim: v, at: at, accepted: make(chan net.Conn), gone: make(chan struct{}),
		silent: make(chan struct{}), frames: map[string][]string{},
	}
}

func (f *faulty) dial(ctx context.Context) (net.Conn, error) {
	f.mu.Lock()
	down := f.struck && (f.victim == cutForGood || f.victim == killSource || f.victim == silentForGood)
	f.mu.Unlock()
	if down {
		return nil, errors.New("no route to host")
	}
	source, a := net.Pipe()
	b, dest := net.Pipe()
	select {
	case f.accepted <- dest:
	case <-f.gone:
		f.wg.Go(func() { _ = AnswerOutcome(dest, time.Second, f.lookup) })
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
	f.mu.Lock()
	f.conns = append(f.conns, a, b)
	f.mu.Unlock()
	f.wg.Go(func() { f.relay(a, b) })
	return source, nil
}

func (f *faulty) accept(ctx context.Context) (net.Conn, error) {
	select {
	case c := <-f.accepted:
		return c, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// relay carries a connection, both ways, until it ends.
func (f *faulty) relay(source, dest net.Conn) {
	defer func() { _ = source.Close() }()
	defer func() { _ = dest.Close() }()
	var preamble [wire.PreambleSize]byte
	if _, err := io.ReadFull(source, preamble[:]); err != nil {
		return
	}
	name := map[wire.Role]string{wire.RoleControl: "control", wire.RoleOutcome: "outcome", wire.RoleData: "data", wire.RolePull: "pull"}[wire.Role(preamble[12])]
	if name == "data" {
		name += fmt.Sprint(preamble[14])
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if f.pass(name+">", "preamble", preamble[:], dest) {
			f.stream(name+">", source, dest)
		}
		_ = dest.Close()
	})
	wg.Go(func() {
		var welcome [wire.WelcomeSize]byte
		if _, err := io.ReadFull(dest, welcome[:]); err == nil && f.pass(name+"<", "welcome", welcome[:], source) {
			f.stream(name+"<", dest, source)
		}
		_ = source.Close()
	})
	wg.Wait()
}

// stream carries frames one way.
func (f *faulty) stream(name string, from io.Reader, to io.Writer) {
	for {
		frame := make([]byte, wire.HeaderSize)
		if _, err := io.ReadFull(from, frame); err != nil {
			return
		}
		rest := binary.LittleEndian.Uint32(frame[8:]) + binary.LittleEndian.Uint32(frame[12:])
		frame = append(frame, make([]byte, rest)...)
		if _, err := io.ReadFull(from, frame[wire.HeaderSize:]); err != nil {
			return
		}
		if !f.pass(name, wire.Type(frame[4]).String(), frame, to) {
			return
		}
	}
}

// pass lets a frame through, unless the fault is due, and says whether to go on.
func (f *faulty) pass(stream, what string, frame []byte, to io.Writer) bool {
	alive := what == wire.TypeAlive.String()
	f.mu.Lock()
	n := len(f.frames[stream])
	due := !alive && !f.struck && f.victim != nobody && f.at.stream == stream && f.at.frames == n
	if !alive {
		f.frames[stream] = append(f.frames[stream], what)
	}
	if due {
		f.struck = true
	}
	silent := f.struck && (f.victim == silenceOnce || f.victim == silentForGood) && stream[0] != 'o'
	f.mu.Unlock()
	if due {
		if f.at.inside {
			_, _ = to.Write(frame[:len(frame)/2])
		}
		f.fault()
		return silent
	}
	if silent {
		return true // it is read, and gets lost
	}
	_, err := to.Write(frame)
	return err == nil
}

// fault does what the fault is.
func (f *faulty) fault() {
	if f.victim == silenceOnce || f.victim == silentForGood {
		return
	}
	f.mu.Lock()
	conns := f.conns
	f.mu.Unlock()
	if f.strike != nil {
		f.strike()
	}
	for _, c := range conns {
		_ = c.Close()
	}
}

// faultRun is one migration with one fault at most.
type faultRun struct {
	ended
	net     *faulty
	w       *world
	vm      *fakeVM
	h       *fakeHost
	decided Outcome // what the parent has
}

// runFault migrates a small VM, of whose pages one of each kind travels.
func runFault(t *testing.T, v victim, at point, o Options) *faultRun {
	return runFaultOf(t, v, at, o, func(*fakeVM, *ReceiveOptions) {})
}

func runFaultOf(t *testing.T, v victim, at point, o Options, change func(*fakeVM, *ReceiveOptions)) *faultRun {
	w := newWorld(t, 64)
	vm := newFakeVM(w, 2<<20)
	vm.fill(3)
	h := &fakeHost{w: w}
	sameAtSwitch(vm, h)
	f := newFaulty(t, v, at)
	r := &faultRun{net: f, w: w, vm: vm, h: h, decided: OutcomeNever}
	var mu sync.Mutex
	f.lookup = func(token Token) Outcome {
		mu.Lock()
		defer mu.Unlock()
		return r.decided
	}
	ro := ReceiveOptions{
		Stall: o.Stall, HelloLimit: time.Second, Committed: func(Token) error {
			mu.Lock()
			defer mu.Unlock()
			if h.isDead() {
				return errDead
			}
			r.decided = OutcomeCommitted
			return nil
		},
	}
	change(vm, &ro)
	vm.startFirst()
	receiving, end := context.WithCancel(context.Background())
	defer end()
	sending, endSource := context.WithCancel(context.Background())
	defer endSource()
	switch v {
	case killSource:
		f.strike = func() { vm.kill(); endSource() }
	case killDest:
		f.strike = func() { h.kill(); end() }
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		defer close(f.gone)
		r.result, r.recvErr = Receive(receiving, h, f.accept, ro)
	})
	r.report, r.sendErr = Send(sending, vm, f.dial, o)
	stop := time.AfterFunc(2*time.Second, end) // it may have heard of nothing
	wg.Wait()
	stop.Stop()
	f.fault()
	f.wg.Wait()
	return r
}

var faultOptions = Options{Connections: 1, Stall: 2 * time.Second, OutcomeLimit: 2 * time.Second}

// TestFaults kills source, destination and network at every boundary between
// messages of a recorded run, and inside each message. Then the VM can run on
// exactly one side, or, where its host was killed, on none.
func TestFaults(t *testing.T) {
	recorded := runFault(t, nobody, point{}, faultOptions)
	if recorded.sendErr != nil || recorded.recvErr != nil {
		t.Fatal(recorded.sendErr, recorded.recvErr)
	}
	var points []point
	for stream, frames := range recorded.net.frames {
		t.Log(stream, frames)
		for i := range frames {
			points = append(points, point{stream, i, false}, point{stream, i, true})
		}
		points = append(points, point{stream, len(frames), false}) // never reached, unless it goes on
	}
	var runs, missed atomic.Int32
	t.Run("all", func(t *testing.T) {
		for _, v := range []victim{killSource, killDest, cutOnce, cutForGood} {
			for _, at := range points {
				if testing.Short() && at.inside {
					continue
				}
				t.Run(fmt.Sprintf("%s/%s", v, at), func(t *testing.T) {
					t.Parallel()
					r := runFault(t, v, at, faultOptions)
					runs.Add(1)
					if !r.net.struck {
						missed.Add(1)
					}
					r.judge(t, v)
				})
			}
		}
	})
	if missed.Load() > runs.Load()/5 {
		t.Errorf("of %d faults %d did not happen", runs.Load(), missed.Load())
	}
	t.Logf("%d runs, %d faults did not happen", runs.Load(), missed.Load())
}

// judge fails the test if a run was not as promised.
func (r *faultRun) judge(t *testing.T, v victim) {
	if problem := r.check(v); problem != "" {
		t.Errorf("%s (struck %v)\nsource: %v\ndestination: %v\n%v", problem, r.net.struck, r.sendErr, r.recvErr, r.net.frames)
	}
}

// TestSilence lets the network lose everything from some message on, without a
// word to anybody.
func TestSilence(t *testing.T) {
	o := faultOptions
	o.Stall = 300 * time.Millisecond
	recorded := runFault(t, nobody, point{}, o)
	for stream, frames := range recorded.net.frames {
		for i := range frames {
			for _, v := range []victim{silenceOnce, silentForGood} {
				t.Run(fmt.Sprintf("%s/%s%d", v, stream, i), func(t *testing.T) {
					t.Parallel()
					r := runFault(t, v, point{stream: stream, frames: i}, o)
					r.judge(t, v)
				})
			}
		}
	}
}

// check holds a run to what is promised, and returns what is wrong.
func (r *faultRun) check(v victim) string {
	sourceRuns, destRuns := r.vm.runs(), r.h.runs()
	var doubt *InDoubtError
	inDoubt := errors.As(r.sendErr, &doubt)
	committed := r.decided == OutcomeCommitted
	switch {
	case sourceRuns && destRuns:
		return "both run"
	case destRuns != (committed && v != killDest) && destRuns != (committed && !r.h.isDead()):
		return fmt.Sprintf("committed %v, and the destination runs: %v", committed, destRuns)
	case sourceRuns && committed:
		return "the source runs what was committed"
	case v != killSource && !sourceRuns && !committed && !inDoubt:
		return "it runs nowhere"
	case inDoubt && (v == nobody || v == cutOnce || v == silenceOnce || v == killDest):
		return "in doubt, although the network is there"
	case inDoubt && sourceRuns:
		return "in doubt, and the source runs"
	case v != killSource && committed && !inDoubt && (r.sendErr != nil || r.vm.left == ""):
		return "committed, and the source does not know"
	case v != killSource && !committed && r.sendErr == nil:
		return "not committed, and the source says it was"
	case v != killDest && !committed && r.recvErr == nil:
		return "not committed, and the destination says it was"
	case !committed && r.h.mem != nil && r.h.abandoned != 1:
		return fmt.Sprintf("what had arrived was freed %d times", r.h.abandoned)
	case v != killSource && r.vm.began:
		return "the source still tracks writes"
	case r.vm.throttle.Load() != 0:
		return "the source is still throttled"
	}
	return r.checkDisks(sourceRuns, destRuns)
}

// checkDisks: who runs has the disks, and nobody else.
func (r *faultRun) checkDisks(sourceRuns, destRuns bool) string {
	owner := ""
	if p := r.w.disks.Load(); p != nil {
		owner = *p
	}
	switch {
	case sourceRuns && owner != "source", destRuns && owner != "destination", !sourceRuns && !destRuns && owner != "":
		return fmt.Sprintf("source runs: %v, destination runs: %v, and the disks are %q's", sourceRuns, destRuns, owner)
	}
	return ""
}
