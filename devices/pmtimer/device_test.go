package pmtimer

import (
	"encoding/binary"
	"math"
	"testing"
	"testing/synctest"
	"time"
)

func read(d *Device) uint32 {
	var b [4]byte
	d.ReadRegister(0, b[:])
	return binary.LittleEndian.Uint32(b[:])
}

// TestCounts: the counter runs at its frequency and wraps at 32 bits.
func TestCounts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New()
		if v := read(d); v != 0 {
			t.Errorf("it begins at %d", v)
		}
		time.Sleep(time.Second)
		if v := read(d); v != Frequency {
			t.Errorf("%d after a second", v)
		}
		d.WriteRegister(0, []byte{1, 2, 3, 4})
		d.SetCounterAt(time.Now(), math.MaxUint32, 0)
		if v := read(d); v != math.MaxUint32 {
			t.Errorf("set to %#x and reads %#x", uint32(math.MaxUint32), v)
		}
		time.Sleep(time.Second)
		if v := read(d); v != Frequency-1 {
			t.Errorf("%d a second after the last value: it does not wrap", v)
		}
		if d.SetCounterAt(time.Now(), 7, 2*time.Second); read(d) != 7+2*Frequency {
			t.Errorf("%d two seconds after 7", read(d))
		}
		before := time.Now().Add(-time.Hour) // before the timer was there
		d.SetCounterAt(before, 7, 0)
		if want := uint32(7 + 3600*Frequency&math.MaxUint32); read(d) != want || d.CounterAt(before) != 7 {
			t.Errorf("%d an hour after 7, want %d; %d then", read(d), want, d.CounterAt(before))
		}
	})
}

// TestParts: a byte or a word of the counter can be read, and nothing behind it.
func TestParts(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := New()
		d.SetCounterAt(time.Now(), 0x44332211, 0)
		for offset, want := range []byte{0x11, 0x22, 0x33, 0x44} {
			b := []byte{0xee}
			if d.ReadRegister(uint64(offset), b); b[0] != want {
				t.Errorf("byte %d is %#x, want %#x", offset, b[0], want)
			}
		}
		b := []byte{0xee, 0xee}
		if d.ReadRegister(3, b); b[0] != 0x44 || b[1] != 0 {
			t.Errorf("a read across the end gives % x", b)
		}
	})
}

// TestTicksNeverOverflow: a guest may run for centuries.
func TestTicksNeverOverflow(t *testing.T) {
	const day = 24 * time.Hour
	want := uint32((uint64(100*365) * 24 * 3600 * Frequency) & math.MaxUint32)
	if got := ticks(100 * 365 * day); got != want {
		t.Errorf("%d ticks in a hundred years, want %d", got, want)
	}
}
