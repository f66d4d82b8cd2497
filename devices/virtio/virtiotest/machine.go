package virtiotest

import (
	"errors"
	"log/slog"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/devices"
	"ditto.vm/devices/pci"
	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// Where the fake machine has its windows.
const (
	ECAM        memory.GPA = 0xE0000000
	WindowStart memory.GPA = 0xC0000000
	WindowSize             = 0x20000000
	memorySize             = 64 << 20
)

// Machine is guest memory, buses and a fake of what KVM does for devices. One
// made by hand, of a real machine's memory and MMIO bus, lets a test play the
// driver of that machine's devices: without MSI-X, whose interrupts would go to
// the vCPUs, and with kicks that take the slow path.
type Machine struct {
	Memory    *memory.Space
	Ports     *devices.Bus
	MMIO      *devices.Bus
	PCI       *pci.Bus
	MSIs      *MSIs
	Doorbells *Doorbells
	Log       *slog.Logger
}

// NewMachine makes an empty machine that ends with the test.
func NewMachine(tb testing.TB) *Machine {
	tb.Helper()
	mem, err := memory.New(memory.Config{Size: memorySize, HugePages: memory.HugePagesOff})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := mem.Close(); err != nil {
			tb.Error(err)
		}
	})
	return NewMachineOn(tb, mem)
}

// NewMachineOn makes a machine on memory that is the caller's: who makes devices
// and vCPUs share memory, or wants large frames. The driver of slot n allocates
// from (1+n) MiB on.
func NewMachineOn(tb testing.TB, mem *memory.Space) *Machine {
	tb.Helper()
	m := &Machine{
		Memory: mem, Ports: &devices.Bus{}, MMIO: &devices.Bus{},
		MSIs:      &MSIs{},
		Doorbells: &Doorbells{fds: map[memory.GPA]int{}},
		Log:       slog.New(slog.DiscardHandler),
	}
	var err error
	m.PCI, err = pci.NewBus(pci.Config{
		Ports: m.Ports, MMIO: m.MMIO, ECAM: ECAM, Log: m.Log,
		Window: memory.Range{Start: WindowStart, Size: WindowSize},
	})
	if err != nil {
		tb.Fatal(err)
	}
	return m
}

// Add puts dev on the machine's PCI bus and returns its slot. The function is
// closed when the test ends.
func (m *Machine) Add(tb testing.TB, dev virtio.Device) (*virtio.PCIDevice, int) {
	tb.Helper()
	f, err := virtio.NewPCIDevice(dev, virtio.PCIConfig{
		Memory: m.Memory, MSIs: m.MSIs, Doorbells: m.Doorbells, Log: m.Log,
	})
	if err != nil {
		tb.Fatal(err)
	}
	slot, err := m.PCI.Add(f)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := f.Close(); err != nil {
			tb.Error(err)
		}
	})
	return f, slot
}

// Write is a guest's store: to a doorbell if there is one, else to the bus.
func (m *Machine) Write(addr memory.GPA, data []byte) bool {
	return m.Doorbells != nil && m.Doorbells.ring(addr) || m.MMIO.Write(uint64(addr), data)
}

// Read is a guest's load.
func (m *Machine) Read(addr memory.GPA, data []byte) bool {
	return m.MMIO.Read(uint64(addr), data)
}

// MSIs is a fake devices.MSIAllocator: an interrupt arrives at whoever waits
// for the data value that its message carries.
type MSIs struct {
	mu       sync.Mutex
	messages map[*msi]devices.MSIMessage
	arrived  map[uint32]chan struct{}
	counts   map[uint32]int
	routes   int
}

type msi struct{ owner *MSIs }

// Trigger implements devices.MSI.
func (m *msi) Trigger() {
	m.owner.mu.Lock()
	defer m.owner.mu.Unlock()
	message, ok := m.owner.messages[m]
	if !ok || message.Masked {
		return
	}
	m.owner.counts[message.Data]++
	select {
	case m.owner.channel(message.Data) <- struct{}{}:
	default:
	}
}

// FD implements devices.MSI; there is no irqfd.
func (m *msi) FD() int { return -1 }

// AllocateMSIs implements devices.MSIAllocator.
func (a *MSIs) AllocateMSIs(n int) ([]devices.MSI, error) {
	out := make([]devices.MSI, n)
	for i := range out {
		out[i] = &msi{owner: a}
	}
	return out, nil
}

// RouteMSIs implements devices.MSIAllocator.
func (a *MSIs) RouteMSIs(msis []devices.MSI, messages []devices.MSIMessage) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(msis) != len(messages) {
		return errors.New("as many messages as interrupts")
	}
	a.routes++
	a.channel(0) // makes the maps
	for i, m := range msis {
		a.messages[m.(*msi)] = messages[i]
	}
	return nil
}

// FreeMSIs implements devices.MSIAllocator.
func (a *MSIs) FreeMSIs(msis []devices.MSI) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range msis {
		delete(a.messages, m.(*msi))
	}
}

// Arrived is signalled after interrupts whose message carries data. Several
// may be merged into one.
func (a *MSIs) Arrived(data uint32) <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.channel(data)
}

// Count is how many interrupts carried data.
func (a *MSIs) Count(data uint32) int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.counts[data]
}

// Routes is how often the routing table was replaced.
func (a *MSIs) Routes() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.routes
}

// channel returns the channel for a message.
//
// Preconditions: mu is held.
func (a *MSIs) channel(data uint32) chan struct{} {
	if a.arrived == nil {
		a.arrived = map[uint32]chan struct{}{}
		a.counts = map[uint32]int{}
		a.messages = map[*msi]devices.MSIMessage{}
	}
	c := a.arrived[data]
	if c == nil {
		c = make(chan struct{}, 1)
		a.arrived[data] = c
	}
	return c
}

// Doorbells is a fake devices.Doorbells.
type Doorbells struct {
	mu  sync.Mutex
	fds map[memory.GPA]int
}

// AddDoorbell implements devices.Doorbells.
func (d *Doorbells) AddDoorbell(addr memory.GPA, _, fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, taken := d.fds[addr]; taken {
		return unix.EEXIST
	}
	d.fds[addr] = fd
	return nil
}

// RemoveDoorbell implements devices.Doorbells.
func (d *Doorbells) RemoveDoorbell(addr memory.GPA, _, fd int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if got, ok := d.fds[addr]; !ok || got != fd {
		return unix.ENOENT
	}
	delete(d.fds, addr)
	return nil
}

// Connected is the number of doorbells.
func (d *Doorbells) Connected() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return len(d.fds)
}

// ring signals the doorbell at addr, if there is one.
func (d *Doorbells) ring(addr memory.GPA) bool {
	d.mu.Lock()
	fd, ok := d.fds[addr]
	d.mu.Unlock()
	if ok {
		one := [8]byte{1}
		_, _ = unix.Write(fd, one[:])
	}
	return ok
}
