// Package rtc is the battery-backed clock of a PC, a Motorola MC146818A: the
// time of day, an alarm, the three interrupts, a century byte and CMOS RAM
// behind an index and a data port.
//
//	0x70  index (bit 7 masks NMI on a PC; here it is ignored)
//	0x71  data: 0x00-0x09 time and alarm, 0x0a-0x0d control, 0x32 century,
//	      the rest CMOS RAM
//
// The time is the host's (Config.Now) plus an offset that moves when the guest
// sets its clock, so nothing ticks while nobody looks: time and flags are
// computed when they are read, and a timer runs only while an interrupt is
// enabled and not yet pending.
//
// Ownership: a timer may run between [New] and [Device.Close]. It is quiet
// between Pause and Resume.
package rtc
