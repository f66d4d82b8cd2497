package vmm

import (
	"context"
	"sync"
	"time"
)

// throttle takes a share of the vCPUs' time from the guest. The zero value takes
// none.
//
//	vCPU thread   | guest .... | nap ........ | guest .... | nap ........ |
//	              |<------- a slice --------->|
//
// A nap is a command to the vCPU's thread, which serves all other commands
// meanwhile: pausing and stopping wait for no nap, and end it.
type throttle struct {
	mu      sync.Mutex // guards what follows
	percent int
	cancel  context.CancelFunc // nil while nothing is taken
	naps    sync.WaitGroup
}

// Slices are longer the less of them the guest gets, so that what it gets is not
// lost in going in and out.
const (
	shortSlice = 10 * time.Millisecond
	longSlice  = 50 * time.Millisecond
	mostTaken  = 99 // percent
	// longNap is as long as a guest naps at most, however late it was told to.
	longNap = 250 * time.Millisecond
)

// slice returns how long the guest runs and how long it naps in a slice.
func slice(percent int) (run, nap time.Duration) {
	whole := shortSlice + (longSlice-shortSlice)*time.Duration(percent)/100
	nap = whole * time.Duration(percent) / 100
	return whole - nap, nap
}

// set takes so many percent from now on.
func (t *throttle) set(vcpus []*vcpu, percent int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	percent = min(max(percent, 0), mostTaken)
	if percent == t.percent {
		return
	}
	if t.cancel != nil {
		t.cancel()
		t.naps.Wait()
		t.cancel = nil
	}
	if t.percent = percent; percent == 0 {
		return
	}
	var ctx context.Context
	ctx, t.cancel = context.WithCancel(context.Background())
	run, nap := slice(percent)
	for _, c := range vcpus {
		t.naps.Go(func() { c.doze(ctx, run, nap) })
	}
}

// due is how long to nap after a guest has run for so long instead of run: a busy
// host tells it late, and it naps the longer then.
func due(ran, run, nap time.Duration) time.Duration {
	if ran <= run {
		return nap
	}
	return max(nap, min(time.Duration(float64(nap)*float64(ran)/float64(run)), longNap))
}

// doze lets a vCPU nap again and again, until ctx or the vCPU's thread ends.
func (c *vcpu) doze(ctx context.Context, run, nap time.Duration) {
	timer := time.NewTimer(run)
	defer timer.Stop()
	for since := time.Now(); ; since = time.Now() {
		select {
		case <-timer.C:
		case <-c.done:
			return
		case <-ctx.Done():
			return
		}
		err := c.do(ctx, func() error {
			c.nap(ctx, due(time.Since(since), run, nap))
			return nil
		})
		if err != nil {
			return
		}
		timer.Reset(run)
	}
}

// nap keeps the vCPU out of the guest for a while, and serves commands
// meanwhile. It ends when the vCPU is paused or stopped. Preconditions: called on
// the vCPU's thread.
func (c *vcpu) nap(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	for !c.paused && !c.stopped {
		select {
		case cmd := <-c.commands:
			c.serve(cmd)
		case <-timer.C:
			return
		case <-ctx.Done():
			return
		}
	}
}
