package rtc

import "time"

// period returns the time between periodic interrupts, 0 for none (data sheet,
// table 5, with a time base of 32768 Hz).
func (d *Device) period() time.Duration {
	rate := d.ram[regA] & aRateMask
	switch {
	case rate == 0:
		return 0
	case rate <= 2:
		rate += 7
	}
	return time.Second >> (16 - rate)
}

// alarm returns the alarm that is set.
func (d *Device) alarm() alarm {
	return d.format().decodeAlarm(d.ram[regHoursAlarm], d.ram[regMinutesAlarm], d.ram[regSecondsAlarm])
}

// update computes the flags up to now, sets the line to match and arms the
// timer for the next interrupt. Preconditions: d.mu is held.
func (d *Device) update() {
	now := d.now()
	if now.Before(d.seen) {
		d.seen = now // the host's clock was set back
	}
	for _, source := range [...]uint8{bPeriodic, bAlarm, bUpdate} {
		if next, ok := d.next(source, d.seen); ok && !next.After(now) {
			d.flags |= source
		}
	}
	d.seen = now
	if d.closed || d.paused {
		return
	}
	pending := d.registerC()&cRequest != 0
	if pending != d.asserted {
		d.asserted = pending
		d.config.Line.SetLevel(pending)
	}
	d.timer.Stop()
	if pending {
		return // until the guest reads register C
	}
	var wait time.Duration
	for _, source := range [...]uint8{bPeriodic, bAlarm, bUpdate} {
		if d.ram[regB]&source == 0 {
			continue
		}
		if next, ok := d.next(source, now); ok && (wait == 0 || next.Sub(now) < wait) {
			wait = next.Sub(now)
		}
	}
	if wait > 0 {
		d.timer.Reset(wait)
	}
}

// next returns when the flag of source is set next after t. A stopped clock
// still has the periodic one.
func (d *Device) next(source uint8, t time.Time) (time.Time, bool) {
	switch {
	case source == bPeriodic:
		period := d.period()
		if period == 0 {
			return time.Time{}, false
		}
		return t.Truncate(period).Add(period), true
	case d.stopped():
		return time.Time{}, false
	case source == bAlarm:
		return d.alarm().next(t)
	}
	return t.Truncate(time.Second).Add(time.Second), true
}

// expire is the timer.
func (d *Device) expire() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.update()
}
