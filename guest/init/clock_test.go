package main

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// fakeClocks are the clocks of a guest that is saved and restored.
type fakeClocks struct {
	host     time.Time     // what the RTC shows, in seconds
	up       time.Duration // since boot
	realtime time.Time
	broken   error
	stalls   int // how many of the next readings of the RTC keep the guest waiting
}

func (c *fakeClocks) rtc() (time.Time, error) {
	shown := c.host.Truncate(time.Second)
	if c.stalls > 0 {
		c.stalls--
		c.run(3700 * time.Millisecond)
	}
	return shown, c.broken
}

func (c *fakeClocks) boottime() time.Duration   { return c.up }
func (c *fakeClocks) wall() time.Time           { return c.realtime }
func (c *fakeClocks) setWall(t time.Time) error { c.realtime = t; return nil }
func (c *fakeClocks) sleep(d time.Duration)     { c.run(d) }

// run lets the guest run, and asleep lets it be saved.
func (c *fakeClocks) run(d time.Duration) {
	c.host, c.up, c.realtime = c.host.Add(d), c.up+d, c.realtime.Add(d)
}
func (c *fakeClocks) asleep(d time.Duration) { c.host = c.host.Add(d) }

func TestKeeper(t *testing.T) {
	start := time.Date(2026, 11, 22, 22, 0, 0, 400e6, time.UTC)
	for _, test := range []struct {
		name   string
		astray time.Duration // how the guest's wall clock is set
		asleep time.Duration
		told   bool
		moves  bool
	}{
		{"runs on", 0, 0, false, false},
		{"runs on, set otherwise", -8 * time.Hour, 0, false, false},
		{"an hour", 0, time.Hour, false, true},
		{"an hour, and told", 0, time.Hour, true, true},
		{"a year", 0, 365 * 24 * time.Hour, false, true},
		{"an hour, set otherwise", -8 * time.Hour, time.Hour, true, true},
		{"a moment", 0, 300 * time.Millisecond, false, false},
		{"a moment, and told", 0, 300 * time.Millisecond, true, true},
		{"told, and right", 0, 0, true, false},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := &fakeClocks{host: start, up: time.Minute, realtime: start}
			k, err := newKeeper(c)
			if err != nil {
				t.Fatal(err)
			}
			c.run(3300 * time.Millisecond)
			c.realtime = c.realtime.Add(test.astray)
			still := func() {
				t.Helper()
				c.run(clockLook)
				if moved, err := k.keep(false); moved != 0 || err != nil {
					t.Errorf("moved by %s, %v", moved, err)
				}
			}
			still()
			c.asleep(test.asleep)
			moved, err := k.keep(test.told)
			if err != nil || (moved != 0) != test.moves {
				t.Fatalf("moved by %s, %v", moved, err)
			}
			if off := c.realtime.Sub(c.host); test.moves && off.Abs() > 20*time.Millisecond {
				t.Errorf("the wall clock is off by %s", off)
			}
			still()
		})
	}
}

// TestKeeperWaits: a guest that has to wait while it reads clocks misses no time,
// and sets its wall clock right when it does.
func TestKeeperWaits(t *testing.T) {
	start := time.Date(2026, 11, 22, 22, 0, 0, 400e6, time.UTC)
	c := &fakeClocks{host: start, up: time.Minute, realtime: start, stalls: 1}
	k, err := newKeeper(c)
	if err != nil {
		t.Fatal(err)
	}
	const otherwise = -8 * time.Hour // which nobody may undo
	c.realtime = c.realtime.Add(otherwise)
	for n := range 10 {
		c.run(clockLook)
		c.stalls = n % 3
		if moved, err := k.keep(false); moved != 0 || err != nil {
			t.Fatalf("moved by %s, %v", moved, err)
		}
	}
	c.realtime = c.realtime.Add(-otherwise)
	c.asleep(time.Hour)
	c.stalls = 2
	behind, err := k.behind()
	if off := behind - time.Hour; err != nil || off.Abs() > clockApart {
		t.Errorf("the wall clock is behind by %s (%v), want an hour", behind, err)
	}
}

// TestKeeperStalls: a guest that has to wait each time it looks gives up waiting
// for better readings.
func TestKeeperStalls(t *testing.T) {
	start := time.Date(2026, 11, 22, 22, 0, 0, 0, time.UTC)
	const many = 1000
	c := &fakeClocks{host: start, realtime: start, stalls: many}
	k, err := newKeeper(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := k.keep(true); err != nil || c.stalls < many/2 {
		t.Errorf("%d readings, %v", many-c.stalls, err)
	}
}

func TestKeeperWithoutRTC(t *testing.T) {
	if _, err := newKeeper(&fakeClocks{broken: errNoRTC}); !errors.Is(err, errNoRTC) {
		t.Errorf("error %v", err)
	}
}

// TestWatchForks reads a log that ends, unlike the kernel's.
func TestWatchForks(t *testing.T) {
	forked := make(chan struct{}, 1)
	watchForks(filepath.Join(t.TempDir(), "absent"), forked)
	log := filepath.Join(t.TempDir(), "kmsg")
	if err := os.WriteFile(log, []byte("5,1,2,-;random: crng reseeded due to virtual machine fork\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	watchForks(log, forked)
	select {
	case <-forked:
		t.Error("a message of the past is a fork")
	default:
	}
}
