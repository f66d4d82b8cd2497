package virtiotest

import (
	"encoding/binary"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// Driver drives one virtio PCI function through its registers.
type Driver struct {
	TB       testing.TB
	Machine  *Machine
	Function *virtio.PCIDevice
	Slot     int
	// Common, Notify, ISR and Config are where the structures are mapped.
	Common, Notify, ISR, Config memory.GPA
	// Window is the offset of the PCI_CFG capability.
	Window int
	// Features are what Negotiate settled on.
	Features uint64

	multiplier uint32
	msixTable  memory.GPA
	msixCap    int
	vectors    int
	queues     []*Queue
	next       memory.GPA // bump allocator
}

// The registers of struct virtio_pci_common_cfg that the driver uses.
const (
	regDeviceFeatureSelect = 0
	regDeviceFeature       = 4
	regDriverFeatureSelect = 8
	regDriverFeature       = 12
	regConfigVector        = 16
	regNumQueues           = 18
	regStatus              = 20
	regQueueSelect         = 22
	regQueueSize           = 24
	regQueueVector         = 26
	regQueueEnable         = 28
	regQueueNotifyOff      = 30
	regQueueDesc           = 32
	regQueueDriver         = 40
	regQueueDevice         = 48
)

// ConfigMessage is the MSI data of the configuration interrupt; queue i uses
// ConfigMessage + 1 + i, moved by 256 for each slot.
const ConfigMessage = 0x1000

// heap is where the driver's allocations begin and end.
const (
	heapStart memory.GPA = 1 << 20
	heapEnd   memory.GPA = memorySize
)

// NewDriver makes a machine with dev on it, and a driver that has found the
// device and enabled memory decoding.
func NewDriver(tb testing.TB, dev virtio.Device) *Driver {
	tb.Helper()
	return NewMachine(tb).NewDriver(tb, dev)
}

// NewDriver adds dev to the machine and finds it as a driver would.
func (m *Machine) NewDriver(tb testing.TB, dev virtio.Device) *Driver {
	tb.Helper()
	f, slot := m.Add(tb, dev)
	return m.Attach(tb, f, slot)
}

// Attach finds a function that is on the bus already, in slot.
func (m *Machine) Attach(tb testing.TB, f *virtio.PCIDevice, slot int) *Driver {
	tb.Helper()
	d := &Driver{TB: tb, Machine: m, Function: f, Slot: slot, next: heapStart + memory.GPA(slot)<<20}
	d.discover()
	return d
}

// discover walks the capability list and switches on memory decoding.
func (d *Driver) discover() {
	d.TB.Helper()
	if vendor := d.ConfigRead(0, 2); vendor != 0x1AF4 {
		d.TB.Fatalf("vendor %#x", vendor)
	}
	d.ConfigWrite(4, 2, 0x6)
	for at := int(d.ConfigRead(0x34, 1)); at != 0; at = int(d.ConfigRead(at+1, 1)) {
		switch d.ConfigRead(at, 1) {
		case 0x09:
			d.vendorCapability(at)
		case 0x11:
			d.msixCap = at
			d.vectors = int(d.ConfigRead(at+2, 2)&0x7FF) + 1
			table := d.ConfigRead(at+4, 4)
			d.msixTable = d.barBase(int(table&7)) + memory.GPA(table&^7)
		}
	}
	if d.Common == 0 || d.Notify == 0 || d.ISR == 0 || d.Config == 0 || d.Window == 0 {
		d.TB.Fatal("a virtio capability is missing")
	}
}

func (d *Driver) vendorCapability(at int) {
	where := d.barBase(int(d.ConfigRead(at+4, 1))) + memory.GPA(d.ConfigRead(at+8, 4))
	switch d.ConfigRead(at+3, 1) {
	case 1:
		d.Common = where
	case 2:
		d.Notify, d.multiplier = where, uint32(d.ConfigRead(at+16, 4))
	case 3:
		d.ISR = where
	case 4:
		d.Config = where
	case 5:
		d.Window = at
	}
}

func (d *Driver) barBase(i int) memory.GPA {
	return memory.GPA(d.ConfigRead(0x10+4*i, 4) &^ 0xF)
}

// ConfigRead reads n bytes of PCI configuration space through ECAM.
func (d *Driver) ConfigRead(offset, n int) uint64 {
	return d.Read(ECAM+memory.GPA(d.Slot<<15|offset), n)
}

// ConfigWrite writes n bytes of PCI configuration space through ECAM.
func (d *Driver) ConfigWrite(offset, n int, value uint64) {
	d.Write(ECAM+memory.GPA(d.Slot<<15|offset), n, value)
}

// Read is a guest load of n bytes.
func (d *Driver) Read(addr memory.GPA, n int) uint64 {
	d.TB.Helper()
	var data [8]byte
	if !d.Machine.Read(addr, data[:n]) {
		d.TB.Fatalf("nothing answers a read of %d bytes at %s", n, addr)
	}
	return binary.LittleEndian.Uint64(data[:])
}

// Write is a guest store of n bytes.
func (d *Driver) Write(addr memory.GPA, n int, value uint64) {
	d.TB.Helper()
	var data [8]byte
	binary.LittleEndian.PutUint64(data[:], value)
	if !d.Machine.Write(addr, data[:n]) {
		d.TB.Fatalf("nothing answers a write of %d bytes at %s", n, addr)
	}
}

// DeviceConfig reads n bytes of the device configuration.
func (d *Driver) DeviceConfig(offset uint64, n int) []byte {
	d.TB.Helper()
	data := make([]byte, n)
	if !d.Machine.Read(d.Config+memory.GPA(offset), data) {
		d.TB.Fatalf("device configuration at %d is not mapped", offset)
	}
	return data
}

// Status reads the device status.
func (d *Driver) Status() uint8 { return uint8(d.Read(d.Common+regStatus, 1)) }

// SetStatus adds bits to the device status.
func (d *Driver) SetStatus(bits uint8) {
	d.Write(d.Common+regStatus, 1, uint64(d.Status()|bits))
}

// Reset writes 0 to the status and checks that it reads back.
func (d *Driver) Reset() {
	d.TB.Helper()
	d.Write(d.Common+regStatus, 1, 0)
	if s := d.Status(); s != 0 {
		d.TB.Fatalf("status is %#x after a reset", s)
	}
	d.queues = nil
}

// Offered reads the features that the device offers.
func (d *Driver) Offered() uint64 {
	d.Write(d.Common+regDeviceFeatureSelect, 4, 0)
	low := d.Read(d.Common+regDeviceFeature, 4)
	d.Write(d.Common+regDeviceFeatureSelect, 4, 1)
	return low | d.Read(d.Common+regDeviceFeature, 4)<<32
}

// Accept goes to FEATURES_OK with exactly the given features and reports
// whether the device agreed.
func (d *Driver) Accept(features uint64) bool {
	d.SetStatus(virtio.StatusAcknowledge | virtio.StatusDriver)
	d.Write(d.Common+regDriverFeatureSelect, 4, 0)
	d.Write(d.Common+regDriverFeature, 4, features&0xFFFFFFFF)
	d.Write(d.Common+regDriverFeatureSelect, 4, 1)
	d.Write(d.Common+regDriverFeature, 4, features>>32)
	d.SetStatus(virtio.StatusFeaturesOK)
	d.Features = features
	return d.Status()&virtio.StatusFeaturesOK != 0
}

// Negotiate accepts what both sides know of want, and VERSION_1.
func (d *Driver) Negotiate(want uint64) {
	d.TB.Helper()
	if !d.Accept(d.Offered()&want | virtio.FeatureVersion1) {
		d.TB.Fatal("the device refuses features that it offered")
	}
}

// Message is the MSI data that queue i's interrupts carry, -1 for the
// configuration's.
func (d *Driver) Message(i int) uint32 {
	return ConfigMessage + uint32(d.Slot)<<8 + uint32(i+1)
}

// EnableMSIX programs one vector for the configuration and one a queue.
func (d *Driver) EnableMSIX() {
	d.TB.Helper()
	d.ConfigWrite(d.msixCap+2, 2, 0xC000) // enabled, all masked
	for v := range d.vectors {
		entry := d.msixTable + memory.GPA(16*v)
		d.Write(entry, 4, 0xFEE00000)
		d.Write(entry+4, 4, 0)
		d.Write(entry+8, 4, uint64(d.Message(v-1)))
		d.Write(entry+12, 4, 0)
	}
	d.ConfigWrite(d.msixCap+2, 2, 0x8000)
	d.Write(d.Common+regConfigVector, 2, 0)
	for i := range int(d.Read(d.Common+regNumQueues, 2)) {
		d.Write(d.Common+regQueueSelect, 2, uint64(i))
		d.Write(d.Common+regQueueVector, 2, uint64(i+1))
		if got := d.Read(d.Common+regQueueVector, 2); got != uint64(i+1) {
			d.TB.Fatalf("queue %d has vector %d", i, got)
		}
	}
}

// Start does everything from a reset to DRIVER_OK: features, MSI-X, all queues
// at up to size entries.
func (d *Driver) Start(want uint64, size int) {
	d.TB.Helper()
	d.Reset()
	d.Negotiate(want)
	d.EnableMSIX()
	d.SetupQueues(size)
	d.SetStatus(virtio.StatusDriverOK)
	if s := d.Status(); s&(virtio.StatusDriverOK|virtio.StatusNeedsReset) != virtio.StatusDriverOK {
		d.TB.Fatalf("status is %#x after DRIVER_OK", s)
	}
}

// SetupQueues places and enables every queue.
func (d *Driver) SetupQueues(size int) {
	d.TB.Helper()
	n := int(d.Read(d.Common+regNumQueues, 2))
	d.queues = nil
	for i := range n {
		d.Write(d.Common+regQueueSelect, 2, uint64(i))
		size := min(size, int(d.Read(d.Common+regQueueSize, 2)))
		d.Write(d.Common+regQueueSize, 2, uint64(size))
		q := newQueue(d, i, size)
		d.writeAddress(regQueueDesc, q.desc)
		d.writeAddress(regQueueDriver, q.avail)
		d.writeAddress(regQueueDevice, q.used)
		q.notify = d.Notify + memory.GPA(uint32(d.Read(d.Common+regQueueNotifyOff, 2))*d.multiplier)
		d.Write(d.Common+regQueueEnable, 2, 1)
		d.queues = append(d.queues, q)
	}
}

// writeAddress writes a 64-bit register in halves, as drivers do.
func (d *Driver) writeAddress(reg memory.GPA, at memory.GPA) {
	d.Write(d.Common+reg, 4, uint64(at)&0xFFFFFFFF)
	d.Write(d.Common+reg+4, 4, uint64(at)>>32)
}

// Queue returns queue i after SetupQueues.
func (d *Driver) Queue(i int) *Queue { return d.queues[i] }

// Queues is the number of queues.
func (d *Driver) Queues() int { return len(d.queues) }

// Alloc returns n zeroed bytes of guest memory. Memory is used again after
// the whole heap was handed out, so nothing may stay in flight that long.
func (d *Driver) Alloc(n, align int) memory.GPA {
	d.TB.Helper()
	at := (d.next + memory.GPA(align-1)) &^ memory.GPA(align-1)
	if at+memory.GPA(n) > heapEnd {
		at = heapStart + 16<<20
	}
	d.next = at + memory.GPA(n)
	mem, err := d.Machine.Memory.Writable(at, uint64(n))
	if err != nil {
		d.TB.Fatal(err)
	}
	clear(mem)
	return at
}
