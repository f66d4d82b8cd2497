package pci

import (
	"encoding/binary"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/devices"
)

// fakeMSIs records what is routed and delivered.
type fakeMSIs struct {
	routes [][]devices.MSIMessage // one entry an update
	log    []int                  // vectors delivered
	fail   error
}

type fakeMSI struct {
	owner  *fakeMSIs
	vector int
}

func (m *fakeMSI) Trigger() { m.owner.log = append(m.owner.log, m.vector) }
func (m *fakeMSI) FD() int  { return -1 }

func (f *fakeMSIs) AllocateMSIs(n int) ([]devices.MSI, error) {
	out := make([]devices.MSI, n)
	for i := range out {
		out[i] = &fakeMSI{f, i}
	}
	return out, f.fail
}

func (f *fakeMSIs) RouteMSIs(_ []devices.MSI, messages []devices.MSIMessage) error {
	f.routes = append(f.routes, append([]devices.MSIMessage(nil), messages...))
	return f.fail
}

func (f *fakeMSIs) FreeMSIs([]devices.MSI) {}

// msixMachine is an endpoint with MSI-X on a bus, memory decoding on.
type msixMachine struct {
	*machine
	fake *fakeMSIs
	x    *MSIX
	slot int
	cap  int
}

func newMSIXMachine(t *testing.T, vectors int) *msixMachine {
	t.Helper()
	m := &msixMachine{machine: newMachine(t), fake: &fakeMSIs{}}
	var err error
	if m.x, err = NewMSIX(m.fake, vectors); err != nil {
		t.Fatal(err)
	}
	e := newTestEndpoint(t)
	if err := e.AddMSIX(1, m.x); err != nil {
		t.Fatal(err)
	}
	m.slot, m.cap = m.add(e), e.msixCap
	m.write(m.slot, 4, 2, commandMemory)
	return m
}

// program writes a table entry as Linux does.
func (m *msixMachine) program(v int, data, control uint32) {
	base := uint64(m.read(m.slot, 0x14, 4)) + uint64(16*v)
	for i, word := range []uint32{0xFEE00000, 0, data, control} {
		var b [4]byte
		binary.LittleEndian.PutUint32(b[:], word)
		m.mmio.Write(base+uint64(4*i), b[:])
	}
}

func (m *msixMachine) pending() uint64 {
	var b [8]byte
	m.mmio.Read(uint64(m.read(m.slot, 0x14, 4))+m.x.pbaOffset(), b[:])
	return binary.LittleEndian.Uint64(b[:])
}

func (m *msixMachine) trigger(v int) {
	m.t.Helper()
	if err := m.x.Trigger(v); err != nil {
		m.t.Fatal(err)
	}
}

func TestMSIXCapability(t *testing.T) {
	m := newMSIXMachine(t, 5)
	if got := m.read(m.slot, m.cap, 4); got != 0x00040011 {
		t.Errorf("capability begins %#x", got)
	}
	if table, pba := m.read(m.slot, m.cap+4, 4), m.read(m.slot, m.cap+8, 4); table != 1 || pba != 0x801 {
		t.Errorf("table %#x, pending bits %#x", table, pba)
	}
	m.write(m.slot, m.cap+2, 2, 0xFFFF)
	if got := m.read(m.slot, m.cap+2, 2); got != 0xC004 {
		t.Errorf("control is %#x", got)
	}
	for n, want := range map[int]uint64{1: 0x1000, 128: 0x1000, 129: 0x2000, 2048: 0x10000} {
		x, err := NewMSIX(&fakeMSIs{}, n)
		if err != nil {
			t.Fatal(err)
		}
		if got := x.barSize(); got != want {
			t.Errorf("%d vectors take a BAR of %#x bytes, want %#x", n, got, want)
		}
	}
	for _, n := range []int{0, 2049} {
		if _, err := NewMSIX(&fakeMSIs{}, n); err == nil {
			t.Errorf("%d vectors accepted", n)
		}
	}
}

// TestMSIXOff drops interrupts while MSI-X is not enabled.
func TestMSIXOff(t *testing.T) {
	m := newMSIXMachine(t, 2)
	m.program(0, 0x21, 0)
	m.trigger(0)
	m.write(m.slot, m.cap+2, 2, msixEnable)
	if len(m.fake.log) != 0 || m.pending() != 0 {
		t.Errorf("delivered %v, pending %#x", m.fake.log, m.pending())
	}
	m.trigger(-1)
	m.trigger(2) // does not exist
	if len(m.fake.log) != 0 {
		t.Errorf("delivered %v", m.fake.log)
	}
}

// TestMSIXBatch routes many vectors, programmed in a row, in one update.
func TestMSIXBatch(t *testing.T) {
	const n = 64
	m := newMSIXMachine(t, n)
	m.write(m.slot, m.cap+2, 2, msixEnable|msixMaskAll)
	for v := range n {
		m.program(v, uint32(v), 1)
	}
	m.write(m.slot, m.cap+2, 2, msixEnable)
	for v := range n {
		m.program(v, uint32(0x100+v), 0)
	}
	for v := range n {
		m.trigger(v)
	}
	if len(m.fake.routes) != 1 || len(m.fake.routes[0]) != n {
		t.Errorf("%d updates of the routing table, want 1", len(m.fake.routes))
	}
	if len(m.fake.log) != n {
		t.Errorf("%d delivered, want %d", len(m.fake.log), n)
	}
	m.program(3, 0x999, 0) // an affinity change
	m.trigger(4)
	if len(m.fake.routes) != 1 {
		t.Error("a vector that did not change was routed again")
	}
	m.trigger(3)
	want := []devices.MSIMessage{{Address: 0xFEE00000, Data: 0x999}}
	if len(m.fake.routes) != 2 || !cmp.Equal(m.fake.routes[1], want) {
		t.Errorf("routes %v after a change", m.fake.routes[1:])
	}
}

// TestMSIXPending keeps what comes while masked, and delivers it once.
func TestMSIXPending(t *testing.T) {
	m := newMSIXMachine(t, 3)
	m.program(0, 0x20, 0)
	m.program(1, 0x21, 1) // masked
	m.write(m.slot, m.cap+2, 2, msixEnable)
	m.trigger(1)
	m.trigger(1)
	if m.pending() != 0b10 || len(m.fake.log) != 0 {
		t.Errorf("pending %#b, delivered %v", m.pending(), m.fake.log)
	}
	m.program(1, 0x21, 0)
	if diff := cmp.Diff([]int{1}, m.fake.log); diff != "" || m.pending() != 0 {
		t.Errorf("after unmasking: pending %#b, delivered\n%s", m.pending(), diff)
	}
	m.write(m.slot, m.cap+2, 2, msixEnable|msixMaskAll)
	m.trigger(0)
	m.trigger(1)
	m.write(m.slot, m.cap+2, 2, msixEnable)
	if diff := cmp.Diff([]int{1, 0, 1}, m.fake.log); diff != "" || m.pending() != 0 {
		t.Errorf("after the function mask: pending %#b, delivered\n%s", m.pending(), diff)
	}
}

// TestMSIXReserved checks that only bit 0 of the vector control sticks and
// that pending bits cannot be written.
func TestMSIXReserved(t *testing.T) {
	m := newMSIXMachine(t, 2)
	m.program(1, 0, 0xFFFFFFFF)
	var b [16]byte
	base := uint64(m.read(m.slot, 0x14, 4))
	m.mmio.Read(base+16, b[:])
	if got := binary.LittleEndian.Uint32(b[12:]); got != 1 {
		t.Errorf("vector control %#x", got)
	}
	m.mmio.Write(base+m.x.pbaOffset(), []byte{0xFF})
	if m.pending() != 0 {
		t.Errorf("pending bits were written: %#x", m.pending())
	}
	m.mmio.Write(base+32, []byte{1, 2, 3, 4}) // behind the table
	m.mmio.Read(base+32, b[:4])
	if binary.LittleEndian.Uint32(b[:]) != 0 {
		t.Error("memory behind the table")
	}
}

func TestMSIXRouteFails(t *testing.T) {
	m := newMSIXMachine(t, 1)
	m.program(0, 0x20, 0)
	m.write(m.slot, m.cap+2, 2, msixEnable)
	m.fake.fail = errors.New("no routes left")
	if err := m.x.Trigger(0); !errors.Is(err, m.fake.fail) {
		t.Errorf("error %v", err)
	}
	m.fake.fail = nil
	m.trigger(0)
	if len(m.fake.log) != 1 {
		t.Errorf("delivered %v", m.fake.log)
	}
	if _, err := NewMSIX(&fakeMSIs{fail: errors.New("none")}, 1); err == nil {
		t.Error("allocation failure ignored")
	}
}

// TestMSIXState carries table and pending bits over, and routes again there.
func TestMSIXState(t *testing.T) {
	m, other := newMSIXMachine(t, 2), newMSIXMachine(t, 2)
	m.program(0, 0x20, 0)
	m.program(1, 0x21, 1)
	m.write(m.slot, m.cap+2, 2, msixEnable)
	m.trigger(0)
	m.trigger(1)
	s := m.bus.slots[m.slot].State()
	if err := other.bus.slots[other.slot].SetState(s); err != nil {
		t.Fatal(err)
	}
	other.trigger(0)
	other.program(1, 0x21, 0)
	if diff := cmp.Diff([]int{0, 1}, other.fake.log); diff != "" {
		t.Errorf("delivered after the restore:\n%s", diff)
	}
	for name, spoil := range map[string]func(*MSIXState){
		"long table":      func(s *MSIXState) { s.Table = append(s.Table, 0) },
		"reserved bits":   func(s *MSIXState) { s.Table[13] = 1 },
		"pending nowhere": func(s *MSIXState) { s.Pending[0] |= 4 },
	} {
		bad := m.bus.slots[m.slot].State()
		spoil(bad.MSIX)
		if err := other.bus.slots[other.slot].SetState(bad); !errors.Is(err, ErrState) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func BenchmarkTrigger(b *testing.B) {
	fake := &fakeMSIs{}
	x, err := NewMSIX(fake, 4)
	if err != nil {
		b.Fatal(err)
	}
	clear(x.table)
	if err := x.setControl(true, false); err != nil {
		b.Fatal(err)
	}
	b.ReportAllocs()
	for b.Loop() {
		fake.log = fake.log[:0]
		if err := x.Trigger(1); err != nil {
			b.Fatal(err)
		}
	}
}
