// Package pmtimer is the ACPI power management timer: a counter at 3.579545 MHz
// behind one port (ACPI 6.5, 4.8.3.3). It is how a kernel that knows nothing of
// KVM's clock finds the frequency of its time-stamp counter: hardware-reduced
// ACPI has neither a legacy timer to calibrate against nor an HPET.
//
// It has no interrupt and never stops; nobody is told when it wraps, after 1200
// seconds.
package pmtimer

import (
	"encoding/binary"
	"math/bits"
	"sync/atomic"
	"time"
)

// Port is where the counter is; the FADT tells the guest.
const Port = 0x608

// Size of the register window in bytes.
const Size = 4

// Frequency of the counter, in Hz.
const Frequency = 3579545

// Device is the timer. Its methods may be called from any goroutine.
type Device struct {
	start  time.Time     // with a monotonic reading
	offset atomic.Uint32 // what the counter was at start
}

// New makes a timer that begins at zero.
func New() *Device { return &Device{start: time.Now()} }

// CounterAt returns the 32-bit counter as it was or will be at t, which has a
// monotonic reading.
func (d *Device) CounterAt(t time.Time) uint32 { return d.offset.Load() + ticks(t.Sub(d.start)) }

// SetCounterAt makes the counter at t what it is some time after v. A restored
// guest for which no time has passed sees no step.
func (d *Device) SetCounterAt(t time.Time, v uint32, later time.Duration) {
	d.offset.Store(v + ticks(later) - ticks(t.Sub(d.start)))
}

// ticks converts a duration, without an overflow however long it is. Before the
// start the counter counts as well, backwards.
func ticks(since time.Duration) uint32 {
	if since < 0 {
		return -ticks(-since)
	}
	hi, lo := bits.Mul64(uint64(since), Frequency)
	n, _ := bits.Div64(hi, lo, uint64(time.Second))
	return uint32(n)
}

// ReadRegister implements devices.Handler. Bytes of one access belong to one
// reading.
func (d *Device) ReadRegister(offset uint64, data []byte) {
	var b [Size]byte
	binary.LittleEndian.PutUint32(b[:], d.CounterAt(time.Now()))
	clear(data)
	if offset < Size {
		copy(data, b[offset:])
	}
}

// WriteRegister implements devices.Handler. The counter is read-only.
func (d *Device) WriteRegister(uint64, []byte) {}
