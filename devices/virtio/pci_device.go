package virtio

import (
	"errors"
	"fmt"
	"log/slog"
	"math/bits"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices"
	"ditto.vm/devices/pci"
	"ditto.vm/memory"
)

// PCIConfig is what a virtio PCI function needs from the machine.
type PCIConfig struct {
	Memory *memory.Space
	MSIs   devices.MSIAllocator
	// Doorbells may be nil: notifications then reach the register bus.
	Doorbells devices.Doorbells
	// Log should carry the device's name under the key dev.
	Log *slog.Logger
}

// PCIDevice gives a [Device] to the guest as a modern virtio PCI function
// (virtio 1.2 4.1). It implements [pci.Function].
//
// Lock order: lifecycle, then the device's own, then mu. The endpoint's lock
// comes before mu too.
type PCIDevice struct {
	dev      Device
	config   PCIConfig
	endpoint *pci.Endpoint
	msix     *pci.MSIX
	offered  uint64
	sizes    []uint16
	kicks    []int // one eventfd a queue

	// lifecycle serializes Start, Stop, Pause and Resume of dev. It is held
	// while workers are joined, so register reads never take it.
	lifecycle sync.Mutex
	running   bool // dev is started
	paused    bool
	active    []*Queue // what dev was started with

	isr        atomic.Uint32
	generation atomic.Uint32

	mu        sync.Mutex // guards the registers below
	registers registers
	epoch     uint64 // counts resets, so that late callbacks are ignored
	doorbells memory.GPA
	rung      int // how many doorbells are connected, at doorbells
	resets    uint64
	nextLog   time.Time
	unlogged  uint64

	vectors []atomic.Uint32 // MSI-X vector of each queue, then of the config
}

// PCI identity (virtio 1.2 4.1.2).
const (
	pciVendor     = 0x1AF4
	pciDeviceBase = 0x1040
	pciSubsystem  = 0x1100
)

// pciClass tells class and subclass by device type, as other VMMs do, so that
// lspci shows something sensible. Drivers match the device number.
func pciClass(id ID) uint32 {
	switch id {
	case IDNet:
		return 0x020000
	case IDBlock:
		return 0x018000
	case IDConsole:
		return 0x078000
	default:
		return 0xFF0000
	}
}

// noVector in a vector register means no interrupt (virtio 1.2 4.1.4.3).
const noVector = 0xFFFF

// NewPCIDevice builds the function around dev. Close it after the bus is gone.
func NewPCIDevice(dev Device, config PCIConfig) (*PCIDevice, error) {
	sizes := dev.QueueSizes()
	if len(sizes) > MaxQueues {
		return nil, fmt.Errorf("virtio %s: %d queues are more than %d", dev.ID(), len(sizes), MaxQueues)
	}
	for i, size := range sizes {
		if size == 0 || size > MaxQueueSize || bits.OnesCount16(size) != 1 {
			return nil, fmt.Errorf("virtio %s: queue %d has size %d", dev.ID(), i, size)
		}
	}
	d := &PCIDevice{
		dev: dev, config: config, sizes: sizes,
		offered: dev.Features() | TransportFeatures,
		vectors: make([]atomic.Uint32, len(sizes)+1),
	}
	d.registers.queues = make([]queueRegisters, len(sizes))
	d.clearRegisters()
	if err := d.build(); err != nil {
		return nil, errors.Join(fmt.Errorf("virtio %s: %w", dev.ID(), err), d.Close())
	}
	return d, nil
}

// build makes the eventfds, MSI-X and the configuration space.
func (d *PCIDevice) build() error {
	for range d.sizes {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
		if err != nil {
			return fmt.Errorf("eventfd: %w", err)
		}
		d.kicks = append(d.kicks, fd)
	}
	var err error
	if d.msix, err = pci.NewMSIX(d.config.MSIs, len(d.vectors)); err != nil {
		return err
	}
	id := d.dev.ID()
	d.endpoint = pci.NewEndpoint(pci.Identity{
		Vendor: pciVendor, Device: pciDeviceBase + uint16(id),
		SubsystemVendor: pciVendor, Subsystem: pciSubsystem,
		Revision: 1, Class: pciClass(id),
	})
	if err := d.addCapabilities(); err != nil {
		return err
	}
	if err := d.endpoint.AddBAR(registerBAR, pci.BAR{
		Size: barSize, Handler: barHandler{d},
		Mapped: d.connectDoorbells, Unmapped: d.disconnectDoorbells,
	}); err != nil {
		return err
	}
	return d.endpoint.AddMSIX(msixBAR, d.msix)
}

// Close stops the device if it runs and frees what the function holds. The
// guest must not run any more.
func (d *PCIDevice) Close() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.stop()
	if d.rung > 0 {
		d.disconnectDoorbells(d.doorbells - notifyOffset)
	}
	if d.msix != nil {
		d.msix.Close()
	}
	var errs []error
	for _, fd := range d.kicks {
		errs = append(errs, unix.Close(fd))
	}
	d.kicks = nil
	return errors.Join(errs...)
}

// Endpoint implements [pci.Function].
func (d *PCIDevice) Endpoint() *pci.Endpoint { return d.endpoint }

// NeedsResets counts how often the driver broke the protocol.
func (d *PCIDevice) NeedsResets() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.resets
}

// connectDoorbells makes KVM signal each queue's eventfd for writes to its
// notify address. What cannot be connected still works through the bus.
func (d *PCIDevice) connectDoorbells(base memory.GPA) {
	if d.config.Doorbells == nil {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.doorbells, d.rung = base+notifyOffset, 0
	for i, fd := range d.kicks {
		// Length 0 matches any write, which KVM finds without decoding the
		// guest's instruction.
		if err := d.config.Doorbells.AddDoorbell(d.doorbells+memory.GPA(i*notifyStride), 0, fd); err != nil {
			d.config.Log.Warn("kicks take the slow path", "queue", i, "err", err)
			return
		}
		d.rung = i + 1
	}
}

func (d *PCIDevice) disconnectDoorbells(base memory.GPA) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range d.rung {
		addr := base + notifyOffset + memory.GPA(i*notifyStride)
		if err := d.config.Doorbells.RemoveDoorbell(addr, 0, d.kicks[i]); err != nil {
			d.config.Log.Warn("doorbell stays connected", "queue", i, "err", err)
		}
	}
	d.rung = 0
}

// interrupt raises the vector at index i of vectors and sets the ISR bits,
// which drivers without MSI-X vectors poll.
func (d *PCIDevice) interrupt(i int, isr uint32) {
	d.isr.Or(isr)
	v := d.vectors[i].Load()
	if v == noVector {
		return
	}
	if err := d.msix.Trigger(int(v)); err != nil {
		d.config.Log.Error("interrupt not delivered", "queue", i, "err", err)
	}
}
