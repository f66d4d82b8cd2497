package rtc

import (
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// line records an interrupt line.
type line struct {
	level atomic.Bool
	edges atomic.Int64
}

func (l *line) SetLevel(asserted bool) {
	if !l.level.Swap(asserted) && asserted {
		l.edges.Add(1)
	}
}

// bench is a clock with a driver's access functions.
type bench struct {
	*Device
	line *line
}

func newBench(t testing.TB, now func() time.Time) *bench {
	l := &line{}
	b := &bench{Device: New(Config{Line: l, Now: now}), line: l}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

func (b *bench) cmos(register byte) byte {
	b.WriteRegister(0, []byte{register})
	v := []byte{0}
	b.ReadRegister(1, v)
	return v[0]
}

func (b *bench) setCMOS(register, v byte) {
	b.WriteRegister(0, []byte{register})
	b.WriteRegister(1, []byte{v})
}

// fixed is a clock that stands still.
func fixed(t time.Time) func() time.Time { return func() time.Time { return t } }

// fields reads the time like a driver, in the order year to second.
func (b *bench) fields() [8]byte {
	return [8]byte{
		b.cmos(regCentury), b.cmos(regYear), b.cmos(regMonth), b.cmos(regDay),
		b.cmos(regWeekday), b.cmos(regHours), b.cmos(regMinutes), b.cmos(regSeconds),
	}
}

func TestFormats(t *testing.T) {
	evening := time.Date(2026, 11, 22, 23, 59, 58, 0, time.FixedZone("", 3600)).Add(time.Hour) // 23:59:58 UTC
	midnight := time.Date(1999, 12, 31, 0, 5, 9, 0, time.UTC)
	noon := time.Date(2000, 1, 1, 12, 0, 0, 0, time.UTC)
	tests := []struct {
		name string
		at   time.Time
		b    byte
		want [8]byte
	}{
		{"BCD, 24 hours", evening, b24Hour, [8]byte{0x20, 0x26, 0x11, 0x22, 1, 0x23, 0x59, 0x58}},
		{"binary, 24 hours", evening, b24Hour | bBinary, [8]byte{20, 26, 11, 22, 1, 23, 59, 58}},
		{"BCD, 12 hours", evening, 0, [8]byte{0x20, 0x26, 0x11, 0x22, 1, 0x91, 0x59, 0x58}},
		{"BCD, 12 hours, midnight", midnight, 0, [8]byte{0x19, 0x99, 0x12, 0x31, 6, 0x12, 0x05, 0x09}},
		{"binary, 12 hours, noon", noon, bBinary, [8]byte{20, 0, 1, 1, 7, 0x8c, 0, 0}},
	}
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			b := newBench(t, fixed(test.at))
			b.setCMOS(regB, test.b)
			if got := b.fields(); got != test.want {
				t.Errorf("got % x, want % x", got, test.want)
			}
		})
	}
}

func TestHoursRoundTrip(t *testing.T) {
	for _, f := range []format{{}, {binary: true}, {hour24: true}, {true, true}} {
		for h := range 24 {
			if got := f.decodeHour(f.encodeHour(h)); got != h {
				t.Errorf("%+v: %d became %d", f, h, got)
			}
		}
	}
}

// TestSetTime is Linux's mc146818_set_time.
func TestSetTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Now)
		b.setCMOS(regB, b24Hour|bSet)
		b.setCMOS(regA, aReset|0x70)
		want := [8]byte{0x20, 0x31, 0x02, 0x28, 0, 0x23, 0x59, 0x59}
		for i, register := range []byte{regCentury, regYear, regMonth, regDay, regWeekday, regHours, regMinutes, regSeconds} {
			b.setCMOS(register, want[i])
		}
		time.Sleep(5 * time.Second)
		if got := b.fields(); got != want {
			t.Errorf("stopped clock shows % x", got)
		}
		b.setCMOS(regB, b24Hour)
		b.setCMOS(regA, aReset)
		time.Sleep(time.Second)
		if got := b.fields(); got != [8]byte{0x20, 0x31, 0x03, 0x01, 7, 0, 0, 0} {
			t.Errorf("a second later the clock shows % x", got)
		}
		b.setCMOS(regHours, 0x13) // without stopping the clock
		if got := b.fields(); got != [8]byte{0x20, 0x31, 0x03, 0x01, 7, 0x13, 0, 0} {
			t.Errorf("after the hour was set the clock shows % x", got)
		}
	})
}

func TestUpdateInProgress(t *testing.T) {
	second := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, test := range []struct {
		at   time.Duration
		want bool
	}{{0, false}, {500 * time.Millisecond, false}, {time.Second - 245*time.Microsecond, false}, {time.Second - 200*time.Microsecond, true}} {
		b := newBench(t, fixed(second.Add(test.at)))
		if got := b.cmos(regA)&aUpdating != 0; got != test.want {
			t.Errorf("UIP %s into the second: %t", test.at, got)
		}
		b.setCMOS(regB, bSet)
		if b.cmos(regA)&aUpdating != 0 {
			t.Error("UIP of a stopped clock")
		}
	}
}

func TestUpdateInterrupt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Now)
		time.Sleep(300 * time.Millisecond)
		b.setCMOS(regB, b24Hour|bUpdate)
		time.Sleep(699 * time.Millisecond)
		synctest.Wait()
		if b.line.level.Load() {
			t.Fatal("interrupt before the second ended")
		}
		time.Sleep(time.Millisecond)
		synctest.Wait()
		if !b.line.level.Load() {
			t.Fatal("no interrupt at the end of the second")
		}
		time.Sleep(10 * time.Second)
		if v := b.cmos(regC); v&(cRequest|bUpdate) != cRequest|bUpdate || b.line.level.Load() {
			t.Errorf("register C %#x, line %t", v, b.line.level.Load())
		}
		if v := b.cmos(regC); v&(cRequest|bUpdate) != 0 {
			t.Errorf("register C %#x after it was read", v)
		}
		time.Sleep(time.Second)
		synctest.Wait()
		if !b.line.level.Load() || b.line.edges.Load() != 2 {
			t.Errorf("line %t, %d edges", b.line.level.Load(), b.line.edges.Load())
		}
		b.setCMOS(regB, b24Hour)
		if b.line.level.Load() {
			t.Error("interrupt stays after it was disabled")
		}
	})
}

func TestAlarm(t *testing.T) {
	synctest.Test(t, func(t *testing.T) { // it is midnight
		b := newBench(t, time.Now)
		b.setCMOS(regHoursAlarm, 0x01)
		b.setCMOS(regMinutesAlarm, 0x30)
		b.setCMOS(regSecondsAlarm, 0x15)
		b.setCMOS(regB, b24Hour|bAlarm)
		time.Sleep(90*time.Minute + 15*time.Second - 1)
		synctest.Wait()
		if b.line.level.Load() {
			t.Fatal("alarm is early")
		}
		time.Sleep(time.Nanosecond)
		synctest.Wait()
		if !b.line.level.Load() {
			t.Fatal("alarm is late")
		}
		if v := b.cmos(regC); v&(cRequest|bAlarm) != cRequest|bAlarm {
			t.Errorf("register C %#x", v)
		}
		b.Pause()
		time.Sleep(24 * time.Hour)
		synctest.Wait()
		if b.line.level.Load() {
			t.Error("interrupt while paused")
		}
		b.Resume()
		if !b.line.level.Load() {
			t.Error("the alarm of the pause was lost")
		}
	})
}

func TestAlarmNext(t *testing.T) {
	at := time.Date(2026, 1, 1, 10, 20, 30, 5, time.UTC)
	for _, test := range []struct {
		alarm alarm
		want  time.Duration // from 10:20:30
	}{
		{alarm{-1, -1, -1}, time.Second},
		{alarm{10, 20, 30}, 24 * time.Hour},
		{alarm{10, 20, 31}, time.Second},
		{alarm{-1, 20, 30}, time.Hour},
		{alarm{-1, -1, 30}, time.Minute},
		{alarm{-1, -1, 29}, 59 * time.Second},
		{alarm{9, -1, -1}, 22*time.Hour + 39*time.Minute + 30*time.Second},
		{alarm{10, 19, -1}, 23*time.Hour + 58*time.Minute + 30*time.Second},
		{alarm{25, 0, 0}, 0}, {alarm{-1, 60, -1}, 0}, {alarm{-1, -1, 99}, 0},
	} {
		got, ok := test.alarm.next(at)
		want := at.Truncate(time.Second).Add(test.want)
		if ok != (test.want != 0) || ok && !got.Equal(want) {
			t.Errorf("%+v: %s %t, want %s", test.alarm, got, ok, want)
		}
	}
	if a := (format{hour24: true}).decodeAlarm(0xff, 0x59, 0xc0); a != (alarm{-1, 59, -1}) {
		t.Errorf("don't care: %+v", a)
	}
}

func TestPeriodic(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Now)
		for _, test := range []struct {
			rate byte
			want time.Duration
		}{{0, 0}, {1, time.Second / 256}, {3, time.Second / 8192}, {6, time.Second / 1024}, {15, time.Second / 2}} {
			b.setCMOS(regA, aReset&0x70|test.rate)
			if got := b.period(); got != test.want {
				t.Errorf("rate %d: %s, want %s", test.rate, got, test.want)
			}
		}
		b.setCMOS(regB, b24Hour|bPeriodic)
		start := b.line.edges.Load()
		for range 20 {
			time.Sleep(50 * time.Millisecond)
			synctest.Wait()
			b.cmos(regC)
		}
		if got := b.line.edges.Load() - start; got != 2 {
			t.Errorf("%d interrupts in a second at 2 Hz", got)
		}
	})
}

func TestPorts(t *testing.T) {
	b := newBench(t, fixed(time.Unix(1e9, 0)))
	b.setCMOS(0x80|0x40, 0xa5) // NMI masked
	if got := b.cmos(0x40); got != 0xa5 {
		t.Errorf("CMOS RAM holds %#x", got)
	}
	if b.cmos(regD)&dValid == 0 {
		t.Error("the battery is empty")
	}
	b.setCMOS(regD, 0)
	b.setCMOS(regC, 0xff)
	if b.cmos(regD) != dValid || b.cmos(regC)&cRequest != 0 {
		t.Error("read-only registers were written")
	}
	v := []byte{0}
	if b.ReadRegister(0, v); v[0] != 0xff {
		t.Errorf("index port reads %#x", v[0])
	}
	wide := []byte{0x41, 0x5a} // outw to the index port reaches both
	b.WriteRegister(0, wide)
	if got := b.cmos(0x41); got != 0x5a {
		t.Errorf("wide write: %#x", got)
	}
	b.setCMOS(regB, bSet|bUpdate)
	if got := b.cmos(regB); got != bSet {
		t.Errorf("SET does not clear UIE: B %#x", got)
	}
}

func TestReset(t *testing.T) {
	b := newBench(t, fixed(time.Unix(1e9, 0)))
	b.setCMOS(0x40, 7)
	b.setCMOS(regYear, 0x31)
	b.setCMOS(regB, b24Hour|bUpdate|bAlarm|bPeriodic)
	b.Reset()
	if b.cmos(regB) != b24Hour || b.cmos(0x40) != 7 || b.cmos(regYear) != 0x31 {
		t.Error("reset keeps interrupts or loses what the battery keeps")
	}
}

func TestStateRoundTrip(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t, time.Now)
		b.setCMOS(regYear, 0x44)
		b.setCMOS(0x50, 9)
		b.setCMOS(regB, b24Hour|bUpdate)
		time.Sleep(time.Second)
		synctest.Wait()
		b.Pause()
		s := b.State()
		c := newBench(t, time.Now)
		if err := c.SetState(s); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(s, c.State()); diff != "" {
			t.Error(diff)
		}
		if c.fields() != b.fields() || !c.line.level.Load() {
			t.Errorf("restored clock shows % x, line %t", c.fields(), c.line.level.Load())
		}
	})
}

func TestSetStateRefuses(t *testing.T) {
	b := newBench(t, time.Now)
	for name, s := range map[string]State{
		"index": {Index: 0x80}, "flags": {Flags: 1}, "A": {RAM: [ramSize]byte{regA: aUpdating}}, "offset": {Offset: maxOffset + 1},
	} {
		if err := b.SetState(s); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

// FuzzRegisters plays arbitrary accesses. The state always restores, and the
// line shows what register C says.
func FuzzRegisters(f *testing.F) {
	f.Add([]byte{0x8b, 0x72, 0x09, 0, 0x8b, 0x82, 0x89, 0xff, 0xb2, 0xff, 0x8b, 0x04, 0x0c, 0})
	f.Fuzz(func(t *testing.T, program []byte) {
		at := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
		now := func() time.Time { return at }
		b := newBench(t, now)
		for ; len(program) >= 2; program = program[2:] {
			register, v := program[0]&0x7f, program[1]
			if program[0]&0x80 != 0 {
				b.setCMOS(register, v)
			} else {
				b.cmos(register)
				at = at.Add(time.Duration(v) * time.Millisecond)
			}
		}
		s := b.State()
		restored := newBench(t, now)
		if err := restored.SetState(s); err != nil {
			t.Fatalf("own state is refused: %v", err)
		}
		if restored.fields() != b.fields() {
			t.Fatal("restored clock shows another time")
		}
		restored.expire()
		if level := restored.line.level.Load(); level != (restored.cmos(regC)&cRequest != 0) {
			t.Fatalf("line is %t against register C", level)
		}
	})
}
