package pci

import (
	"encoding/binary"
	"errors"
	"log/slog"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/devices"
	"ditto.vm/memory"
)

const (
	testECAM        memory.GPA = 0xE0000000
	testWindowStart memory.GPA = 0xC0000000
	testWindowSize             = 0x20000000
)

// machine is a bus with access to its two ways into configuration space.
type machine struct {
	t     testing.TB
	ports devices.Bus
	mmio  devices.Bus
	bus   *Bus
}

func newMachine(t testing.TB) *machine {
	t.Helper()
	m := &machine{t: t}
	var err error
	m.bus, err = NewBus(Config{
		Ports: &m.ports, MMIO: &m.mmio, ECAM: testECAM, Log: slog.New(slog.DiscardHandler),
		Window: memory.Range{Start: testWindowStart, Size: testWindowSize},
	})
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func (m *machine) add(f Function) int {
	m.t.Helper()
	slot, err := m.bus.Add(f)
	if err != nil {
		m.t.Fatal(err)
	}
	return slot
}

// read reads configuration space through ECAM.
func (m *machine) read(slot, offset, n int) uint32 {
	var data [4]byte
	if !m.mmio.Read(uint64(testECAM)+uint64(slot<<15|offset), data[:n]) {
		m.t.Fatal("ECAM does not answer")
	}
	return binary.LittleEndian.Uint32(data[:])
}

func (m *machine) write(slot, offset, n int, value uint32) {
	var data [4]byte
	binary.LittleEndian.PutUint32(data[:], value)
	if !m.mmio.Write(uint64(testECAM)+uint64(slot<<15|offset), data[:n]) {
		m.t.Fatal("ECAM does not answer")
	}
}

// scratch is a BAR with memory behind it that remembers where it was mapped.
type scratch struct {
	data  []byte
	moves []memory.GPA // mapped as is, unmapped as complement
}

func newScratch(n int) *scratch { return &scratch{data: make([]byte, n)} }

func (s *scratch) ReadRegister(offset uint64, data []byte)  { copy(data, s.data[offset:]) }
func (s *scratch) WriteRegister(offset uint64, data []byte) { copy(s.data[offset:], data) }

func (s *scratch) bar() BAR {
	return BAR{
		Size: uint64(len(s.data)), Handler: s,
		Mapped:   func(base memory.GPA) { s.moves = append(s.moves, base) },
		Unmapped: func(base memory.GPA) { s.moves = append(s.moves, ^base) },
	}
}

func newTestEndpoint(t testing.TB, bars ...*scratch) *Endpoint {
	t.Helper()
	e := NewEndpoint(Identity{Vendor: 0x1234, Device: 0x5678, SubsystemVendor: 0x9ABC, Subsystem: 0xDEF0, Revision: 3, Class: 0x010203})
	for i, s := range bars {
		if err := e.AddBAR(i, s.bar()); err != nil {
			t.Fatal(err)
		}
	}
	return e
}

func TestIdentity(t *testing.T) {
	m := newMachine(t)
	slot := m.add(newTestEndpoint(t))
	if slot != 1 {
		t.Errorf("first device in slot %d", slot)
	}
	for _, c := range []struct {
		name   string
		offset int
		n      int
		want   uint32
	}{
		{"vendor and device", 0x00, 4, 0x56781234},
		{"device", 0x02, 2, 0x5678},
		{"revision and class", 0x08, 4, 0x01020303},
		{"header type", 0x0E, 1, 0},
		{"subsystem", 0x2C, 4, 0xDEF09ABC},
		{"no capability", 0x34, 1, 0},
		{"no interrupt pin", 0x3D, 1, 0},
		{"extended space", 0x100, 4, 0},
		{"end of extended space", 0xFFC, 4, 0},
	} {
		if got := m.read(slot, c.offset, c.n); got != c.want {
			t.Errorf("%s reads %#x, want %#x", c.name, got, c.want)
		}
	}
	if got := m.read(0, 0x0A, 2); got != 0x0600 {
		t.Errorf("slot 0 has class %#x, want a host bridge", got)
	}
	if got := m.read(slot+1, 0, 4); got != 0xFFFFFFFF {
		t.Errorf("an empty slot reads %#x", got)
	}
	if got := m.read(slot, 1<<12, 4); got != 0xFFFFFFFF {
		t.Errorf("function 1 reads %#x", got)
	}
	m.write(slot, 0, 4, 0)
	if got := m.read(slot, 0, 4); got != 0x56781234 {
		t.Errorf("the identity was overwritten: %#x", got)
	}
}

func TestPortAccess(t *testing.T) {
	m := newMachine(t)
	slot := m.add(newTestEndpoint(t))
	out := func(port uint64, data ...byte) { m.ports.Write(port, data) }
	in := func(port uint64, n int) []byte {
		data := make([]byte, n)
		m.ports.Read(port, data)
		return data
	}
	out(0xCF8, 0x00, byte(slot<<3), 0x00, 0x80)
	for _, c := range []struct {
		port uint64
		want []byte
	}{
		{0xCFC, []byte{0x34, 0x12, 0x78, 0x56}},
		{0xCFE, []byte{0x78, 0x56}},
		{0xCFD, []byte{0x12}},
	} {
		if got := in(c.port, len(c.want)); !slices.Equal(got, c.want) {
			t.Errorf("port %#x reads %#x, want %#x", c.port, got, c.want)
		}
	}
	if got := in(0xCF8, 4); !slices.Equal(got, []byte{0x00, byte(slot << 3), 0x00, 0x80}) {
		t.Errorf("address reads back %#x", got)
	}
	out(0xCF9, 0x06) // the reset port of other chipsets: not an address
	out(0xCF8, 0xFF, 0xFF)
	if got := in(0xCFC, 4); got[0] != 0x34 {
		t.Errorf("a short write changed the address: %#x", got)
	}
	out(0xCF8, 0x04, byte(slot<<3), 0x00, 0x80)
	out(0xCFC, 0x06, 0x00)
	if got := m.read(slot, 4, 2); got != 6 {
		t.Errorf("command is %#x after a write to the port", got)
	}
	out(0xCF8, 0x00, byte(slot<<3), 0x00, 0x00)
	if got := in(0xCFC, 4); !slices.Equal(got, []byte{0xFF, 0xFF, 0xFF, 0xFF}) {
		t.Errorf("disabled access reads %#x", got)
	}
	out(0xCF8, 0x00, byte(slot<<3), 0x01, 0x80)
	if got := in(0xCFC, 4); got[0] != 0xFF {
		t.Errorf("bus 1 reads %#x", got)
	}

	m.write(0, 0x3C, 1, 0x5A) // the host bridge's interrupt line
	saved := m.bus.State()
	other := newMachine(t)
	if err := other.bus.SetState(saved); err != nil {
		t.Fatal(err)
	}
	if other.bus.State() != saved || other.read(0, 0x3C, 1) != 0x5A {
		t.Error("state changed on the way")
	}
	saved.Address++
	saved.Bridge.Config[0] ^= 1
	if err := other.bus.SetState(saved); !errors.Is(err, ErrState) {
		t.Errorf("a bridge of another kind: %v", err)
	}
	if other.bus.State().Address == saved.Address {
		t.Error("a refused state changed the bus")
	}
}

func TestBARSizing(t *testing.T) {
	m := newMachine(t)
	a, b := newScratch(0x4000), newScratch(0x1000)
	slot := m.add(newTestEndpoint(t, a, b))
	for i, want := range []uint32{0xFFFFC000, 0xFFFFF000, 0, 0, 0, 0} {
		before := m.read(slot, 0x10+4*i, 4)
		m.write(slot, 0x10+4*i, 4, 0xFFFFFFFF)
		if got := m.read(slot, 0x10+4*i, 4); got != want {
			t.Errorf("BAR %d sizes as %#x, want %#x", i, got, want)
		}
		m.write(slot, 0x10+4*i, 4, before)
	}
	if len(a.moves)+len(b.moves) != 0 {
		t.Errorf("BARs were mapped without memory decoding: %#x %#x", a.moves, b.moves)
	}
	if base := m.read(slot, 0x10, 4); base != uint32(testWindowStart) {
		t.Errorf("BAR 0 starts at %#x", base)
	}
	if base := m.read(slot, 0x14, 4); base != uint32(testWindowStart)+0x4000 {
		t.Errorf("BAR 1 starts at %#x", base)
	}
}

func TestBARMoves(t *testing.T) {
	m := newMachine(t)
	s := newScratch(0x1000)
	slot := m.add(newTestEndpoint(t, s))
	probe := func(addr memory.GPA) bool { return m.mmio.Read(uint64(addr), make([]byte, 4)) }
	home, away := testWindowStart, testWindowStart+0x10000

	if probe(home) {
		t.Error("answers without memory decoding")
	}
	m.write(slot, 4, 2, commandMemory)
	if !probe(home) {
		t.Error("does not answer with memory decoding")
	}
	m.write(slot, 0x10, 4, 0xFFFFFFFF) // sizing with decoding on
	if probe(home) {
		t.Error("still answers while being sized")
	}
	m.write(slot, 0x10, 4, uint32(away))
	if probe(home) || !probe(away) {
		t.Error("did not move")
	}
	for _, bad := range []memory.GPA{0, 0x1000, testECAM, 0xFEE00000, testWindowStart - 0x1000, testWindowStart + testWindowSize} {
		m.write(slot, 0x10, 4, uint32(bad))
		if len(s.moves)%2 != 0 {
			t.Errorf("mapped at %s", bad)
		}
	}
	m.write(slot, 0x10, 4, uint32(home))
	m.write(slot, 4, 2, 0)
	if probe(home) {
		t.Error("answers after memory decoding went off")
	}
	want := []memory.GPA{home, ^home, away, ^away, home, ^home}
	if diff := cmp.Diff(want, s.moves); diff != "" {
		t.Errorf("moves:\n%s", diff)
	}
}

// TestBAROverlap lets one BAR wait until another has left its place.
func TestBAROverlap(t *testing.T) {
	m := newMachine(t)
	a, b := newScratch(0x1000), newScratch(0x1000)
	a.data[0], b.data[0] = 'a', 'b'
	first, second := m.add(newTestEndpoint(t, a)), m.add(newTestEndpoint(t, b))
	m.write(first, 4, 2, commandMemory)
	m.write(second, 4, 2, commandMemory)
	at := func(addr memory.GPA) byte {
		var data [1]byte
		m.mmio.Read(uint64(addr), data[:])
		return data[0]
	}
	m.write(second, 0x10, 4, uint32(testWindowStart))
	if got := at(testWindowStart); got != 'a' {
		t.Errorf("who was first lost its place to %q", got)
	}
	m.write(first, 0x10, 4, uint32(testWindowStart)+0x5000)
	m.write(second, 4, 2, commandMemory) // any write looks again
	if got := at(testWindowStart); got != 'b' {
		t.Errorf("free place is taken by %q", got)
	}
	if got := at(testWindowStart + 0x5000); got != 'a' {
		t.Errorf("new place is taken by %q", got)
	}
}

func TestBusIsFull(t *testing.T) {
	m := newMachine(t)
	for range Slots - 1 {
		m.add(newTestEndpoint(t, newScratch(0x1000)))
	}
	if _, err := m.bus.Add(newTestEndpoint(t)); err == nil {
		t.Error("33rd device accepted")
	}
}

func TestWindowIsFull(t *testing.T) {
	m := newMachine(t)
	e := NewEndpoint(Identity{})
	if err := e.AddBAR(0, BAR{Size: 1 << 30, Handler: newScratch(1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := m.bus.Add(e); err == nil {
		t.Error("1 GiB placed in a window of 512 MiB")
	}
}

func TestBadParts(t *testing.T) {
	var ports, mmio devices.Bus
	for _, w := range []memory.Range{{}, {Start: 4 << 30, Size: 1 << 20}, {Start: 0xFFFFF000, Size: 0x2000}, {Start: ^memory.GPA(0), Size: 2}} {
		if _, err := NewBus(Config{Ports: &ports, MMIO: &mmio, ECAM: testECAM, Window: w}); err == nil {
			t.Errorf("window %v accepted", w)
		}
	}
	e := newTestEndpoint(t, newScratch(0x1000))
	for _, c := range []struct {
		i    int
		size uint64
	}{{0, 0x1000}, {-1, 0x1000}, {6, 0x1000}, {1, 0}, {1, 0x800}, {1, 0x3000}, {1, 1 << 31}} {
		if err := e.AddBAR(c.i, BAR{Size: c.size}); err == nil {
			t.Errorf("BAR %d of %#x bytes accepted", c.i, c.size)
		}
	}
	if _, err := e.AddCapability(Capability{ID: 9, Body: make([]byte, 200)}); err == nil {
		t.Error("capability beyond the end accepted")
	}
}

func TestCapabilities(t *testing.T) {
	m := newMachine(t)
	e := newTestEndpoint(t)
	var reads, writes [][2]int
	first, err := e.AddCapability(Capability{ID: 9, Body: []byte{1, 2, 3}})
	if err != nil {
		t.Fatal(err)
	}
	second, err := e.AddCapability(Capability{
		ID: 5, Body: []byte{0, 0, 0xAA, 0xBB}, Writable: []byte{0, 0xFF, 0x0F},
		BeforeRead: func(offset, n int) { reads = append(reads, [2]int{offset, n}) },
		AfterWrite: func(offset, n int) { writes = append(writes, [2]int{offset, n}) },
	})
	if err != nil {
		t.Fatal(err)
	}
	slot := m.add(e)
	if m.read(slot, 0x06, 2)&statusCapabilities == 0 || m.read(slot, 0x34, 1) != uint32(first) || m.read(slot, first+1, 1) != uint32(second) || m.read(slot, second+1, 1) != 0 {
		t.Error("the capability list is broken")
	}
	reads = nil // of the list
	m.write(slot, second, 4, 0xFFFFFFFF)
	m.write(slot, second+4, 4, 0xFFFFFFFF)
	if got := m.read(slot, second, 4); got != 0xFF000005 {
		t.Errorf("first word is %#x", got)
	}
	if got := m.read(slot, second+4, 2); got != 0xBBAF {
		t.Errorf("second word is %#x", got)
	}
	m.read(slot, second-2, 4) // begins before it
	if want := [][2]int{{0, 4}, {4, 2}, {-2, 4}}; !slices.Equal(reads, want) {
		t.Errorf("reads %v, want %v", reads, want)
	}
	if want := [][2]int{{0, 4}, {4, 4}}; !slices.Equal(writes, want) {
		t.Errorf("writes %v, want %v", writes, want)
	}
}

func TestEndpointState(t *testing.T) {
	m, other := newMachine(t), newMachine(t)
	a, b := newScratch(0x1000), newScratch(0x1000)
	e, f := newTestEndpoint(t, a), newTestEndpoint(t, b)
	slot := m.add(e)
	other.add(f)
	m.write(slot, 4, 2, commandMemory|commandBusMaster)
	m.write(slot, 0x10, 4, uint32(testWindowStart)+0x8000)
	s := e.State()
	if err := f.SetState(s); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(s, f.State()); diff != "" {
		t.Errorf("state changed on the way:\n%s", diff)
	}
	if want := []memory.GPA{testWindowStart + 0x8000}; !slices.Equal(b.moves, want) {
		t.Errorf("BAR is mapped at %v, want %v", b.moves, want)
	}
	for _, offset := range []int{0, 2, 6, 8, 0x0E, 0x10, 0x2C, 0x34, 0x40, 0xFF} {
		bad := s
		bad.Config[offset] ^= 1
		if err := f.SetState(bad); !errors.Is(err, ErrState) {
			t.Errorf("changed byte %#x: %v", offset, err)
		}
	}
}

// FuzzConfig writes anything anywhere; nothing may panic, the identity stays,
// and BARs are mapped inside the window only.
func FuzzConfig(f *testing.F) {
	f.Add([]byte{4, 0, 2, 6, 0x10, 0, 4, 0xFF, 0xFF, 0xFF, 0xFF})
	f.Add([]byte{0x42, 0, 4, 0, 0, 0, 0xC0, 0xFE, 0xF, 8, 1, 2, 3, 4, 5, 6, 7, 8})
	f.Fuzz(func(t *testing.T, program []byte) {
		m := newMachine(t)
		s := newScratch(0x1000)
		e := newTestEndpoint(t, s)
		x, err := NewMSIX(&fakeMSIs{}, 3)
		if err != nil {
			t.Fatal(err)
		}
		if err := e.AddMSIX(1, x); err != nil {
			t.Fatal(err)
		}
		slot := m.add(e)
		for len(program) >= 3 {
			offset := uint64(binary.LittleEndian.Uint16(program))
			n := min(int(program[2]&15), len(program)-3)
			data := program[3 : 3+n]
			program = program[3+n:]
			m.mmio.Write(uint64(testECAM)+uint64(slot)<<15+offset, data)
			m.mmio.Write(uint64(m.read(slot, 0x14, 4))+offset, data)
			m.mmio.Read(uint64(testECAM)+uint64(slot)<<15+offset, make([]byte, n))
			_ = x.Trigger(int(offset % 5))
		}
		if got := m.read(slot, 0, 4); got != 0x56781234 {
			t.Fatalf("identity is %#x", got)
		}
		window := memory.Range{Start: testWindowStart, Size: testWindowSize}
		for _, at := range s.moves {
			if at>>32 == 0 && !window.Contains(at, 0x1000) {
				t.Fatalf("BAR is mapped at %s", at)
			}
		}
		if err := newRestored(t).SetState(e.State()); err != nil {
			t.Fatalf("what a guest made cannot be restored: %v", err)
		}
	})
}

// newRestored makes an endpoint built as in FuzzConfig.
func newRestored(t *testing.T) *Endpoint {
	t.Helper()
	e := newTestEndpoint(t, newScratch(0x1000))
	x, err := NewMSIX(&fakeMSIs{}, 3)
	if err != nil {
		t.Fatal(err)
	}
	if err := e.AddMSIX(1, x); err != nil {
		t.Fatal(err)
	}
	newMachine(t).add(e)
	return e
}
