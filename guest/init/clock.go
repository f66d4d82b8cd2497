package main

import (
	"bytes"
	"errors"
	"math"
	"time"

	"golang.org/x/sys/unix"
)

// A guest that was saved and is restored later, or cloned, finds that no time has
// passed by its own clocks: CLOCK_MONOTONIC must not jump, and so CLOCK_REALTIME is
// behind by the time that it slept. The machine's RTC shows the host's time, and
// tells.

const (
	// clockLook is how often the RTC is looked at where the kernel does not tell
	// that its machine is another (before Linux 5.18).
	clockLook = 10 * time.Second
	// clockMissed is how much time must be missing then: the RTC counts seconds.
	clockMissed = 2 * time.Second
	// clockOff is how much the wall clock may be off after a restore.
	clockOff = 50 * time.Millisecond
	// clockApart is how far apart two readings may be that are compared, and
	// clockStep how long is waited between looks at the RTC.
	clockApart = 40 * time.Millisecond
	clockStep  = 5 * time.Millisecond
	// clockTries is how often clocks are read that are too far apart.
	clockTries = 10
)

// clocks is what a keeper reads and sets.
type clocks interface {
	rtc() (time.Time, error) // in seconds, of the machine
	boottime() time.Duration // which does not go on while the machine is saved
	wall() time.Time         // CLOCK_REALTIME
	setWall(time.Time) error //
	sleep(time.Duration)     // by a clock of the guest
}

// keeper keeps the wall clock right.
type keeper struct {
	clocks
	ahead time.Duration // what the RTC was ahead of the time since boot
}

// newKeeper looks for the first time. It fails where there is no RTC.
func newKeeper(c clocks) (*keeper, error) {
	k := &keeper{clocks: c}
	_, err := k.look()
	return k, err
}

// look compares the clocks, and returns how much time is missing since the last
// look. A guest that had to wait between reading one and the other, on a busy host
// or while it was migrated, reads them again: it is not the clocks that differ.
// After a few times it must do.
func (k *keeper) look() (missing time.Duration, err error) {
	for n := 1; ; n++ {
		before := k.boottime()
		rtc, err := k.rtc()
		if err != nil {
			return 0, err
		}
		up := k.boottime()
		if up-before > clockApart && n < clockTries {
			k.sleep(time.Second)
			continue
		}
		ahead := time.Duration(rtc.UnixNano()) - up
		missing, k.ahead = ahead-k.ahead, ahead
		return missing, nil
	}
}

// keep sets the wall clock by the RTC if the guest was restored: that is known,
// or time is missing. At other times whoever set it otherwise shall have it so. It
// returns by how much it was moved, zero if it was right.
func (k *keeper) keep(restored bool) (moved time.Duration, err error) {
	missing, err := k.look()
	if err != nil || !restored && missing < clockMissed {
		return 0, err
	}
	if moved, err = k.behind(); err != nil || moved.Abs() < clockOff {
		return 0, err
	}
	return moved, k.setWall(k.wall().Add(moved))
}

// behind returns by how much the wall clock is behind the RTC. It waits until that
// shows another second: only then is it known to less than one. A guest that had to
// wait just then tries again at the next; after a few of them the best must do.
func (k *keeper) behind() (behind time.Duration, err error) {
	best := time.Duration(math.MaxInt64)
	for n := 0; n < clockTries && best > clockApart; {
		before := k.wall()
		first, err := k.rtc()
		if err != nil {
			return 0, err
		}
		k.sleep(clockStep)
		now, err := k.rtc()
		if err != nil {
			return 0, err
		}
		if now.Equal(first) {
			continue
		}
		n++
		if apart := k.wall().Sub(before); apart < best {
			best, behind = apart, now.Sub(before.Add(apart/2))
		}
	}
	return behind, nil
}

// keepTime keeps the wall clock right for as long as the guest lives.
func keepTime(log *logger) {
	k, err := newKeeper(machineClocks{})
	if err != nil {
		return // a kernel without an RTC driver
	}
	forked := make(chan struct{}, 1)
	go watchForks("/dev/kmsg", forked)
	tick := time.NewTicker(clockLook)
	for {
		restored := false
		select {
		case <-tick.C:
		case <-forked:
			restored = true
		}
		moved, err := k.keep(restored)
		switch {
		case errors.Is(err, unix.EBUSY): // somebody else has it open
		case err != nil:
			log.printf("warning: wall clock: %v", err)
			return
		case moved != 0:
			log.printf("clock moved=%.3f", moved.Seconds())
		}
	}
}

// forkMessage is what Linux logs when the generation ID of its machine changes
// (drivers/char/random.c). There is no other sign of it outside the kernel.
const forkMessage = "virtual machine fork"

// watchForks sends on forked when the kernel log has a new message of a fork.
func watchForks(kmsg string, forked chan<- struct{}) {
	fd, err := unix.Open(kmsg, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	_, _ = unix.Seek(fd, 0, unix.SEEK_END)
	buf := make([]byte, 8192) // one record a read
	for {
		n, err := unix.Read(fd, buf)
		switch {
		case err == unix.EINTR || err == unix.EPIPE: // EPIPE: some were lost
			continue
		case err != nil || n == 0:
			return
		case bytes.Contains(buf[:n], []byte(forkMessage)):
			select {
			case forked <- struct{}{}:
			default:
			}
		}
	}
}

// machineClocks are the clocks of the machine.
type machineClocks struct{}

var errNoRTC = errors.New("no real-time clock")

func (machineClocks) rtc() (time.Time, error) {
	fd, err := unix.Open("/dev/rtc0", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return time.Time{}, errors.Join(errNoRTC, err)
	}
	defer unix.Close(fd)
	t, err := unix.IoctlGetRTCTime(fd)
	if err != nil {
		return time.Time{}, err
	}
	return time.Date(int(t.Year)+1900, time.Month(t.Mon+1), int(t.Mday), int(t.Hour), int(t.Min), int(t.Sec), 0, time.UTC), nil
}

func (machineClocks) boottime() time.Duration {
	return time.Duration(uptime() * float64(time.Second))
}

func (machineClocks) wall() time.Time { return time.Now().Round(0) }

func (machineClocks) setWall(t time.Time) error {
	ts := unix.NsecToTimespec(t.UnixNano())
	return unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

func (machineClocks) sleep(d time.Duration) { time.Sleep(d) }
