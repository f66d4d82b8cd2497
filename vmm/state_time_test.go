package vmm

import (
	"errors"
	"testing"
	"time"

	"ditto.vm/devices/pmtimer"
	"ditto.vm/internal/labtest"
)

// TestLabRestoreClocksAgree is TestRestoreClocksAgree where the guest's
// time-stamp counter is its own.
func TestLabRestoreClocksAgree(t *testing.T) {
	labtest.Need(t)
	clocksAgree(t, true)
}

// TestRestoreClocksAgree: however long a restore takes, and a resume after it,
// the clocks of a guest stay together, and none of them has noticed.
func TestRestoreClocksAgree(t *testing.T) { clocksAgree(t, false) }

func clocksAgree(t *testing.T, counters bool) {
	c := payloadConfig("spin")
	c.CPUs = 2
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := errors.Join(m.Start(ctx), m.Pause(ctx)); err != nil {
		t.Fatal(err)
	}
	begin, before := time.Now(), clocksOf(t, m)
	for range 2 { // the second time after a run
		m = restoreOf(t, m, c, RestoreOptions{})
		const wait = 300 * time.Millisecond // which the guest does not see
		time.Sleep(wait)
		restored := clocksOf(t, m)
		if passed, limit := restored.clock.kvmclock-before.clock.kvmclock, time.Since(begin)-wait; passed > limit {
			t.Errorf("%s have passed for a guest that did not run, want %s at most", passed, limit)
		}
		clocksTogether(t, "after a restore", before, restored, counters)
		time.Sleep(wait)
		if err := errors.Join(m.Resume(ctx), m.Pause(ctx)); err != nil {
			t.Fatal(err)
		}
		resumed := clocksOf(t, m)
		clocksTogether(t, "after a resume", before, resumed, counters)
		begin, before = time.Now(), resumed
	}
}

// clocksOf reads the clocks of a paused VM as a save does.
func clocksOf(t *testing.T, m *VM) *savedState {
	t.Helper()
	s, err := decodeState(saveOf(t, m), &m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// clocksTogether fails when one clock has gone farther than another by more than
// what Linux bears.
func clocksTogether(t *testing.T, when string, before, after *savedState, counters bool) {
	t.Helper()
	const bearable = 500 * time.Microsecond
	passed := after.clock.kvmclock - before.clock.kvmclock
	apart := func(clock string, d time.Duration) {
		t.Helper()
		if d -= passed; d.Abs() > bearable {
			t.Errorf("%s %s is %s ahead of kvmclock, for which %s have passed", when, clock, d, passed)
		}
	}
	apart("the timer", time.Duration(after.platform.PmTimer-before.platform.PmTimer)*time.Second/pmtimer.Frequency)
	if !counters {
		return
	}
	for i, c := range after.cpu.vcpus {
		n := c.tsc() - before.cpu.vcpus[i].tsc()
		apart("a time-stamp counter", time.Duration(float64(n)/float64(after.cpu.tscKHz)*1e6))
	}
	if a, b := after.cpu.vcpus[0].tsc()-after.cpu.vcpus[1].tsc(), before.cpu.vcpus[0].tsc()-before.cpu.vcpus[1].tsc(); a != b {
		t.Errorf("%s the counters are %d apart, before %d", when, int64(a), int64(b))
	}
}
