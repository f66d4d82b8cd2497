// Package rtc is the battery-backed clock of a PC, a Motorola MC146818A: the
// time of day, an alarm, the update-ended interrupt and 114 bytes of CMOS RAM
// behind an index and a data port.
//
// The time is the host's (Config.Now) plus an offset that the guest moves when
// it sets the clock. Periodic interrupts (PIE) are not generated: Linux makes
// them itself with high-resolution timers; the flag in register C is.
package rtc
