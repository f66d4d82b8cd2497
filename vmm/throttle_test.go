package vmm

import (
	"errors"
	"testing"
	"time"
)

// TestDue: a guest that was told late naps longer, and not for ever.
func TestDue(t *testing.T) {
	for _, percent := range []int{1, 20, 50, 90, 99} {
		run, nap := slice(percent)
		if whole := run + nap; whole < shortSlice || whole > longSlice || nap*100 != whole*time.Duration(percent) {
			t.Errorf("%d %%: %s of %s", percent, nap, whole)
		}
		for ran, want := range map[time.Duration]time.Duration{
			run / 2: nap, run: nap, 2 * run: min(2*nap, longNap), time.Hour: longNap,
		} {
			if got := due(ran, run, nap); got != want {
				t.Errorf("%d %%: a nap of %s after %s, want %s", percent, got, ran, want)
			}
		}
	}
}

// TestThrottle: the guest executes less, and pause, stop and commands do not wait.
func TestThrottle(t *testing.T) {
	c := payloadConfig("memwriter:size=4M,words=8,order=random,seed=1")
	c.CPUs = 2
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	writes := func() uint64 {
		before, began := mustStatus(t, m).Writes, time.Now()
		time.Sleep(200 * time.Millisecond)
		return uint64(float64(mustStatus(t, m).Writes-before) / time.Since(began).Seconds())
	}
	source := m.MigrationSource()
	for _, tc := range []struct {
		percent int
		most    float64 // of what it does else
	}{{50, 0.8}, {90, 0.4}, {99, 0.2}} {
		// Whatever else the host does, both are measured in turn until that shows.
		got := 0.0
		for agree := 0; agree < 3; agree++ {
			source.Throttle(0)
			full := writes()
			source.Throttle(tc.percent)
			if got = float64(writes()) / float64(full+1); got > tc.most {
				agree = -1
			}
			if ctx.Err() != nil {
				t.Fatalf("a guest that is throttled by %d %% does %.2f of what it did", tc.percent, got)
			}
		}
		t.Logf("throttled by %d %% it does %.3f of what it did", tc.percent, got)
	}
	for range 20 {
		if err := errors.Join(m.Pause(ctx), m.Resume(ctx)); err != nil {
			t.Fatal(err)
		}
	}
	source.Throttle(0)
	runUntil(t, m, 1000)
	source.Throttle(99)
	// It is closed while it naps.
}
