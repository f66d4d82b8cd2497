package main

import (
	"bytes"
	"errors"
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
// look.
func (k *keeper) look() (missing time.Duration, err error) {
	rtc, err := k.rtc()
	if err != nil {
		return 0, err
	}
	ahead := time.Duration(rtc.UnixNano()) - k.boottime()
	missing, k.ahead = ahead-k.ahead, ahead
	return missing, nil
}

// keep sets the wall clock by the RTC if the guest was restored: that is known,
// or time is missing. At other times whoever set it otherwise shall have it so. It
// returns by how much it was moved, zero if it was right.
func (k *keeper) keep(restored bool) (moved time.Duration, err error) {
	missing, err := k.look()
	if err != nil || !restored && missing < clockMissed {
		return 0, err
	}
	now, err := k.nextSecond()
	if err != nil {
		return 0, err
	}
	if moved = now.Sub(k.wall()); moved.Abs() < clockOff {
		return 0, nil
	}
	return moved, k.setWall(now)
}

// nextSecond waits until the RTC shows another second, and returns it: only then
// is it known to less than one.
func (k *keeper) nextSecond() (time.Time, error) {
	const step = 5 * time.Millisecond
	first, err := k.rtc()
	for now := first; err == nil; now, err = k.rtc() {
		if !now.Equal(first) {
			return now, nil
		}
		k.sleep(step)
	}
	return time.Time{}, err
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
