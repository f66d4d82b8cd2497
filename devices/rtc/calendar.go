package rtc

import "time"

// format is how the guest chose to read the clock (register B).
type format struct {
	binary bool // else BCD
	hour24 bool // else 1 to 12, with bit 7 for the afternoon
}

// afternoon is the PM bit of a 12-hour clock.
const afternoon = 0x80

// encode converts a number below 100.
func (f format) encode(v int) byte {
	if f.binary {
		return byte(v)
	}
	return byte(v/10<<4 | v%10)
}

// decode is the inverse of encode. Digits above 9 count as they are.
func (f format) decode(b byte) int {
	if f.binary {
		return int(b)
	}
	return int(b>>4)*10 + int(b&0xf)
}

// encodeHour converts an hour from 0 to 23.
func (f format) encodeHour(h int) byte {
	if f.hour24 {
		return f.encode(h)
	}
	b := f.encode((h+11)%12 + 1)
	if h >= 12 {
		b |= afternoon
	}
	return b
}

// decodeHour is the inverse of encodeHour.
func (f format) decodeHour(b byte) int {
	if f.hour24 {
		return f.decode(b)
	}
	h := f.decode(b&^afternoon) % 12
	if b&afternoon != 0 {
		h += 12
	}
	return h
}

// clock is the time as the guest's registers show it.
type clock [timeRegisters + 1]byte

// centuryField is where clock keeps the century, which has a register of its
// own.
const centuryField = timeRegisters

// encodeTime returns the registers that show t.
func (f format) encodeTime(t time.Time) clock {
	var c clock
	c[regSeconds] = f.encode(t.Second())
	c[regMinutes] = f.encode(t.Minute())
	c[regHours] = f.encodeHour(t.Hour())
	c[regWeekday] = f.encode(int(t.Weekday()) + 1)
	c[regDay] = f.encode(t.Day())
	c[regMonth] = f.encode(int(t.Month()))
	c[regYear] = f.encode(t.Year() % 100)
	c[centuryField] = f.encode(t.Year() / 100 % 100)
	return c
}

// decodeTime returns the time that the registers show. Fields out of range
// carry into the next.
func (f format) decodeTime(c clock) time.Time {
	return time.Date(
		f.decode(c[centuryField])*100+f.decode(c[regYear]), time.Month(f.decode(c[regMonth])), f.decode(c[regDay]),
		f.decodeHour(c[regHours]), f.decode(c[regMinutes]), f.decode(c[regSeconds]), 0, time.UTC)
}

// alarm is a time of day at which the alarm rings; -1 is any.
type alarm struct{ hour, minute, second int }

// anyTime marks an alarm register that matches everything: 0xc0 to 0xff.
const anyTime = 0xc0

// decodeAlarm returns the alarm that the registers hold.
func (f format) decodeAlarm(hours, minutes, seconds byte) alarm {
	a := alarm{-1, -1, -1}
	if hours&anyTime != anyTime {
		a.hour = f.decodeHour(hours)
	}
	if minutes&anyTime != anyTime {
		a.minute = f.decode(minutes)
	}
	if seconds&anyTime != anyTime {
		a.second = f.decode(seconds)
	}
	return a
}

// next returns the first second after t at which the alarm rings, and false
// when it never does.
func (a alarm) next(t time.Time) (time.Time, bool) {
	differs := func(want, is int) bool { return want >= 0 && want != is }
	n := t.Truncate(time.Second).Add(time.Second)
	for end := n.Add(25 * time.Hour); n.Before(end); {
		switch {
		case differs(a.hour, n.Hour()):
			n = n.Truncate(time.Hour).Add(time.Hour)
		case differs(a.minute, n.Minute()):
			n = n.Truncate(time.Minute).Add(time.Minute)
		case differs(a.second, n.Second()):
			n = n.Add(time.Second)
		default:
			return n, true
		}
	}
	return time.Time{}, false
}
