package ged

import (
	"bytes"
	"encoding/binary"
	"testing"

	"ditto.vm/memory"

	"github.com/google/go-cmp/cmp"
)

const idAt = 0xff000

// bench is the device with its surroundings.
type bench struct {
	*Device
	mem         *memory.Space
	level       bool
	off, resets int
}

func (b *bench) SetLevel(asserted bool) { b.level = asserted }

func newBench(t testing.TB) *bench {
	t.Helper()
	mem, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = mem.Close() })
	b := &bench{mem: mem}
	b.Device, err = New(Config{
		Line: b, Memory: mem, GenerationID: idAt,
		OnPowerOff: func() { b.off++ }, OnReset: func() { b.resets++ },
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) events() uint32 {
	var v [4]byte
	b.ReadRegister(RegEvents, v[:])
	return binary.LittleEndian.Uint32(v[:])
}

func (b *bench) id(t testing.TB) [GenerationIDSize]byte {
	t.Helper()
	var id [GenerationIDSize]byte
	if err := b.mem.ReadAt(id[:], idAt); err != nil {
		t.Fatal(err)
	}
	return id
}

func TestPowerButton(t *testing.T) {
	b := newBench(t)
	if b.level || b.events() != 0 {
		t.Error("an event is pending after start")
	}
	b.PressPowerButton()
	if !b.level {
		t.Error("no interrupt")
	}
	if err := b.ChangeGenerationID(); err != nil {
		t.Fatal(err)
	}
	if got := b.events(); got != EventPowerButton|EventVMGenID {
		t.Errorf("events %#x", got)
	}
	if b.level || b.events() != 0 {
		t.Error("reading did not take the events back")
	}
	b.PressPowerButton()
	if err := b.Reset(); err != nil || b.level || b.events() != 0 {
		t.Errorf("reset: %v, line %t", err, b.level)
	}
}

func TestGenerationID(t *testing.T) {
	b := newBench(t)
	first := b.id(t)
	if first == [GenerationIDSize]byte{} || first != b.State().GenerationID {
		t.Errorf("ID % x", first)
	}
	if err := b.ChangeGenerationID(); err != nil {
		t.Fatal(err)
	}
	second := b.id(t)
	if second == first || !b.level {
		t.Error("the ID did not change, or the guest was not told")
	}
	if err := b.mem.WriteAt(make([]byte, 64), idAt-16); err != nil {
		t.Fatal(err)
	}
	if err := b.Reset(); err != nil || b.id(t) != second {
		t.Errorf("reset does not put the ID back: %v", err)
	}
}

func TestSleepAndReset(t *testing.T) {
	for _, test := range []struct {
		name        string
		offset      uint64
		data        []byte
		off, resets int
	}{
		{"S5", RegSleepControl, []byte{SleepTypeOff<<2 | 1<<5}, 1, 0},
		{"S5 not enabled", RegSleepControl, []byte{SleepTypeOff << 2}, 0, 0},
		{"S3", RegSleepControl, []byte{3<<2 | 1<<5}, 0, 0},
		{"wake status", RegSleepStatus, []byte{0x80}, 0, 0},
		{"reset", RegReset, []byte{ResetValue}, 0, 1},
		{"reset, other value", RegReset, []byte{0x41}, 0, 0},
		{"wide write", RegSleepControl, []byte{SleepTypeOff<<2 | 1<<5, 0}, 0, 0},
		{"empty write", RegReset, nil, 0, 0},
		{"events are read-only", RegEvents, []byte{1, 0, 0, 0}, 0, 0},
	} {
		b := newBench(t)
		b.WriteRegister(test.offset, test.data)
		if b.off != test.off || b.resets != test.resets || b.events() != 0 {
			t.Errorf("%s: off %d, resets %d", test.name, b.off, b.resets)
		}
	}
}

func TestReadsAreDefined(t *testing.T) {
	b := newBench(t)
	b.PressPowerButton()
	for _, n := range []int{1, 2, 8} { // a narrow read must not lose the event
		v := bytes.Repeat([]byte{0xa5}, n)
		b.ReadRegister(RegEvents, v)
		if !bytes.Equal(v, make([]byte, n)) {
			t.Errorf("%d bytes read % x", n, v)
		}
	}
	if b.events() != EventPowerButton {
		t.Error("the event was lost")
	}
	v := []byte{0xa5}
	if b.ReadRegister(RegSleepStatus, v); v[0] != 0 {
		t.Errorf("sleep status %#x", v[0])
	}
}

func TestNewRefuses(t *testing.T) {
	b := newBench(t)
	good := b.config
	for name, breakIt := range map[string]func(*Config){
		"no line": func(c *Config) { c.Line = nil }, "no memory": func(c *Config) { c.Memory = nil },
		"no power-off": func(c *Config) { c.OnPowerOff = nil }, "no reset": func(c *Config) { c.OnReset = nil },
		"unaligned ID": func(c *Config) { c.GenerationID++ }, "ID outside RAM": func(c *Config) { c.GenerationID = 1<<20 - 8 },
	} {
		c := good
		breakIt(&c)
		if _, err := New(c); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	good.GenerationID = 0
	d, err := New(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := d.ChangeGenerationID(); err != nil || b.level {
		t.Errorf("without an ID: %v, line %t", err, b.level)
	}
}

func TestStateRoundTrip(t *testing.T) {
	b := newBench(t)
	b.PressPowerButton()
	s := b.State()
	c := newBench(t)
	if err := c.SetState(s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, c.State()); diff != "" || !c.level || c.id(t) != b.id(t) {
		t.Errorf("line %t, ID % x: %s", c.level, c.id(t), diff)
	}
	if err := c.SetState(State{Events: 1 << 31}); err == nil {
		t.Error("unknown event accepted")
	}
}

// FuzzRegisters plays arbitrary accesses: only the two documented writes do
// anything.
func FuzzRegisters(f *testing.F) {
	f.Add(uint16(RegSleepControl), []byte{0x34})
	f.Add(uint16(RegReset), []byte{ResetValue})
	b := newBench(f)
	f.Fuzz(func(t *testing.T, offset uint16, data []byte) {
		b.off, b.resets = 0, 0
		b.WriteRegister(uint64(offset), data)
		if b.off+b.resets > 0 && (len(data) != 1 || offset != RegSleepControl && offset != RegReset) {
			t.Fatalf("write of % x at %#x", data, offset)
		}
		b.ReadRegister(uint64(offset), data)
	})
}
