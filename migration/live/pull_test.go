package live

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/memory"
)

// pulled waits until the pages that came later are there, and compares memory.
func pulled(t *testing.T, vm *fakeVM, h *fakeHost) {
	t.Helper()
	if h.fetched == nil {
		t.Error("nothing came later")
		return
	}
	if err := <-h.fetched; err != nil {
		t.Error(err)
	}
	if d := differing(t, vm.mem, h.mem); len(d) > 0 {
		t.Errorf("%d pages differ after post-copy, the first is %v", len(d), d[0])
	}
}

func TestPostcopy(t *testing.T) {
	for name, o := range map[string]Options{
		"one":        {Postcopy: true},
		"trusted":    {Postcopy: true, Connections: 3, Trusted: true},
		"zstd":       {Postcopy: true, Connections: 2, Compression: Zstd},
		"by timeout": {OnTimeout: TimeoutPostcopy, Timeout: 20 * time.Millisecond, Connections: 1},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 600)
			vm := newFakeVM(w, 8<<20)
			vm.fill(1)
			vm.guest = writer(2, 0)
			h := &fakeHost{w: w}
			vm.startFirst()
			o.Downtime = 1
			e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{Postcopy: true})
			if e.sendErr != nil || e.recvErr != nil || e.report.Mode != modePostcopy || e.report.Pull <= 0 || !h.runs() || vm.left == "" {
				t.Fatalf("source: %v, destination: %v, %+v", e.sendErr, e.recvErr, e.report)
			}
			pulled(t, vm, h)
			// A fault that was on its way when the page came asks once more.
			if err := h.source.ReadPages(vm.gfn(0), make([]byte, memory.PageSize)); !errors.Is(err, errAllArrived) {
				t.Errorf("asked for a page when all have arrived: %v", err)
			}
		})
	}
}

// TestPostcopyRefused: it is agreed on before anything is sent.
func TestPostcopyRefused(t *testing.T) {
	w := newWorld(t, 10)
	vm := newFakeVM(w, 1<<20)
	vm.startFirst()
	e := move(t.Context(), vm, &fakeHost{w: w}, loopback(t), Options{Postcopy: true}, ReceiveOptions{})
	if e.sendErr == nil || !strings.Contains(e.sendErr.Error(), "cannot do post-copy") || !vm.runs() {
		t.Errorf("%v", e.sendErr)
	}
}

// dirtyWriter writes so much that post-copy has something to do, and then rests.
func dirtyWriter(ctx context.Context, vm *fakeVM) {
	for i := 0; i < len(vm.hints) && ctx.Err() == nil; i += 3 {
		vm.write(vm.gfn(i).GPA(), []byte{byte(i), 1})
	}
	for i := 0; ctx.Err() == nil; i++ {
		vm.write(vm.gfn(i%len(vm.hints)).GPA(), []byte{byte(i), 2})
		time.Sleep(10 * time.Microsecond)
	}
}

// TestPostcopyFaults cuts the network at every message, before and after the commit:
// before, the VM stays; after, its guest waits, and the source comes back.
func TestPostcopyFaults(t *testing.T) {
	o := Options{Postcopy: true, Connections: 1, Downtime: 1, Stall: 2 * time.Second, OutcomeLimit: 2 * time.Second}
	recorded := runPostcopy(t, nobody, point{}, o)
	if recorded.sendErr != nil || recorded.recvErr != nil {
		t.Fatal(recorded.sendErr, recorded.recvErr)
	}
	for stream, frames := range recorded.net.frames {
		t.Log(stream, frames)
		for i := range frames {
			for _, inside := range []bool{false, true} {
				at := point{stream, i, inside}
				t.Run(at.String(), func(t *testing.T) {
					t.Parallel()
					r := runPostcopy(t, cutOnce, at, o)
					if r.decided == OutcomeCommitted {
						pulled(t, r.vm, r.h)
						if r.recvErr != nil || !r.h.runs() || r.vm.runs() {
							t.Errorf("source: %v, destination: %v\n%v", r.sendErr, r.recvErr, r.net.frames)
						}
						var peer *PeerError // the word that all is there may get lost
						if r.sendErr != nil && !errors.As(r.sendErr, &peer) {
							t.Errorf("source: %v", r.sendErr)
						}
						return
					}
					if !r.vm.runs() || r.h.runs() || r.sendErr == nil {
						t.Errorf("source: %v, destination: %v", r.sendErr, r.recvErr)
					}
				})
			}
		}
	}
}

func runPostcopy(t *testing.T, v victim, at point, o Options) *faultRun {
	return runFaultOf(t, v, at, o, func(vm *fakeVM, ro *ReceiveOptions) {
		vm.guest = dirtyWriter
		ro.Postcopy = true
		ro.Stall = 300 * time.Millisecond
	})
}

// TestPullGivenUp: when the VM at the destination is ended, nobody waits any more.
func TestPullGivenUp(t *testing.T) {
	mem := newSpace(t, 1<<20)
	missing := mem.NewPageSet()
	missing.Add(0x3000, 5*memory.PageSize)
	p := newPuller(mem, missing)
	result := make(chan error)
	go func() { result <- p.ReadPages(4, make([]byte, 2*memory.PageSize)) }()
	p.close(errGivenUp)
	if err := <-result; !errors.Is(err, errGivenUp) {
		t.Error(err)
	}
	if err := p.ReadPages(4, make([]byte, memory.PageSize)); !errors.Is(err, errGivenUp) {
		t.Error(err)
	}
	if row := p.Row(70); row != (memory.Range{Start: 64 << 12, Size: 64 << 12}) {
		t.Error(fmt.Sprint(row))
	}
}

// TestPostcopySourceEnded: whoever ends the source by force while the guest at the
// destination still needs its memory is not kept waiting, connected or not.
func TestPostcopySourceEnded(t *testing.T) {
	for name, connected := range map[string]bool{"connected": true, "destination gone": false} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t, 600)
			vm := newFakeVM(w, 8<<20)
			vm.fill(1)
			vm.guest, vm.ended = dirtyWriter, make(chan struct{})
			h := &fakeHost{w: w}
			vm.startFirst()
			n := loopback(t)
			var mu sync.Mutex
			var conns []net.Conn
			cut := false
			dial := func(ctx context.Context) (net.Conn, error) {
				mu.Lock()
				defer mu.Unlock()
				if cut {
					return nil, errors.New("no route to host")
				}
				c, err := n.dial(ctx)
				conns = append(conns, c)
				return c, err
			}
			o := Options{Postcopy: true, Connections: 1, Downtime: 1, Events: func(e Event) {
				mu.Lock()
				defer mu.Unlock()
				if e.Phase != PhasePull || cut {
					return
				}
				cut = true
				if connected {
					close(vm.ended)
					return
				}
				for _, c := range conns {
					_ = c.Close()
				}
				time.AfterFunc(100*time.Millisecond, func() { close(vm.ended) })
			}}
			receiving, end := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			wg.Go(func() { _, _ = Receive(receiving, h, n.accept, ReceiveOptions{Postcopy: true}) })
			r, err := Send(t.Context(), vm, dial, o)
			end()
			wg.Wait()
			if !errors.Is(err, errEndedEarly) || r.Outcome != OutcomeCommitted || vm.runs() {
				t.Errorf("%v, outcome %v, the guest runs here: %v", err, r.Outcome, vm.runs())
			}
		})
	}
}
