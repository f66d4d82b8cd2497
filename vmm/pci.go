package vmm

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ditto.vm/devices/pci"
	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/console"
	"ditto.vm/devices/virtio/rng"
	"ditto.vm/memory"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// pciDevices is the PCI bus and what sits on it.
type pciDevices struct {
	bus     *pci.Bus
	devices []*virtioDevice
	threads int // worker goroutines of all devices
	slot    int // of the next device

	balloon *balloon.Device // nil without one
	console *console.Device // nil when the console is the serial port
}

// virtioDevice is a virtio device on the bus.
type virtioDevice struct {
	*virtio.PCIDevice
	dev      virtio.Device
	info     api.Device
	powerOn  virtio.PCIState
	counters func(map[string]uint64) // adds the device's own, may be nil
	held     *ballooned              // of the balloon, may be nil
}

// firstSlot is the slot behind the host bridge.
const firstSlot = 1

// addPCI makes the bus and the virtio devices that the configuration asks for,
// disks first, so that they have the same names in every guest.
func (m *VM) addPCI(ctx context.Context, opts Options) error {
	var err error
	m.pci.bus, err = pci.NewBus(pci.Config{
		Ports:  &m.ports,
		MMIO:   &m.mmio,
		ECAM:   ecamBase,
		Window: memory.Range{Start: pciWindowBase, Size: pciWindowSize},
		Log:    m.log.With("dev", "pci"),
	})
	if err != nil {
		return fmt.Errorf("PCI bus: %w", err)
	}
	m.pci.slot = firstSlot
	if m.saved != nil && m.saved.disksLater {
		m.pci.slot += len(m.cfg.Disks)
	} else if err := m.addDisks(); err != nil {
		return err
	}
	if err := m.addNets(ctx, opts); err != nil {
		return err
	}
	if m.cfg.RNG {
		if err := m.addVirtio(rng.New(rng.Config{}), api.Device{Name: "rng0", Backend: "getrandom"}, 1, nil); err != nil {
			return err
		}
	}
	if m.cfg.Balloon.Enabled {
		if err := m.addBalloon(); err != nil {
			return err
		}
	}
	if m.cfg.Console == config.ConsoleVirtio {
		return m.addConsole(opts)
	}
	return nil
}

// addDisks adds the disks.
func (m *VM) addDisks() error {
	for i, d := range m.cfg.Disks {
		if err := m.addDisk(i, d); err != nil {
			return err
		}
	}
	return nil
}

// addDisksLater adds the disks behind everything else, and where they would have
// been.
func (m *VM) addDisksLater() error {
	others := m.pci.devices
	m.pci.devices, m.pci.slot = nil, firstSlot
	err := m.addDisks()
	m.pci.devices = append(m.pci.devices, others...)
	m.enoughProcs()
	return err
}

// addBalloon adds the memory balloon with its first target.
func (m *VM) addBalloon() error {
	c := m.cfg.Balloon
	offer := balloon.Config{
		DeflateOnOOM:      bool(c.DeflateOnOOM),
		FreePageReporting: bool(c.FreePageReporting),
	}
	var held *ballooned
	if m.frames != nil {
		held = &ballooned{space: m.mem, frames: m.frames}
		offer.Holder = held
	}
	b, err := balloon.New(offer)
	if err != nil {
		return fmt.Errorf("balloon: %w", err)
	}
	m.cleanup.add(b.Close)
	b.SetTarget(uint64(c.Size))
	if err := b.SetStatsInterval(time.Duration(c.StatsInterval)); err != nil {
		return fmt.Errorf("balloon: %w", err)
	}
	m.pci.balloon = b
	if err := m.addVirtio(b, api.Device{Name: "balloon0"}, 1, func(counters map[string]uint64) {
		counters["target_bytes"], counters["actual_bytes"] = b.Target(), b.Actual()
		counters["reclaimed_bytes"] = b.Reclaimed()
	}); err != nil {
		return err
	}
	m.pci.devices[len(m.pci.devices)-1].held = held
	return nil
}

// addConsole adds the virtio console.
func (m *VM) addConsole(opts Options) error {
	c, err := console.New(console.Config{Output: opts.Console})
	if err != nil {
		return fmt.Errorf("console: %w", err)
	}
	m.cleanup.add(c.Close)
	m.pci.console = c
	return m.addVirtio(c, api.Device{Name: "console0"}, 1, nil)
}

// addVirtio puts a virtio device into the next slot. threads is how many
// workers it runs.
func (m *VM) addVirtio(dev virtio.Device, info api.Device, threads int, counters func(map[string]uint64)) error {
	d, err := virtio.NewPCIDevice(dev, virtio.PCIConfig{
		Memory:    m.mem,
		MSIs:      m.irqs,
		Doorbells: &doorbells{vm: m.kvm},
		Log:       m.log.With("dev", info.Name),
	})
	if err != nil {
		return fmt.Errorf("%s: %w", info.Name, err)
	}
	m.cleanup.add(d.Close)
	slot := m.pci.slot
	if err := m.pci.bus.AddAt(slot, d); err != nil {
		return fmt.Errorf("%s: %w", info.Name, err)
	}
	m.pci.slot++
	d.Pause() // a state can be taken only then
	powerOn, err := d.State()
	if err = errors.Join(err, d.Resume()); err != nil {
		return fmt.Errorf("%s: %w", info.Name, err)
	}
	info.Kind = "virtio-" + dev.ID().String()
	info.Address = fmt.Sprintf("0000:00:%02x.0", slot)
	m.pci.devices = append(m.pci.devices, &virtioDevice{PCIDevice: d, dev: dev, info: info, powerOn: powerOn, counters: counters})
	m.pci.threads += threads
	return nil
}

// pause drains and parks every device. Preconditions: the vCPUs are paused.
func (p *pciDevices) pause() {
	for _, d := range p.devices {
		d.Pause()
	}
}

// resume goes on after pause, in the opposite order.
func (p *pciDevices) resume() error {
	var errs []error
	for i := len(p.devices) - 1; i >= 0; i-- {
		errs = append(errs, p.devices[i].Resume())
	}
	return errors.Join(errs...)
}

// stop ends every device's work for good and joins the workers.
func (p *pciDevices) stop() {
	for _, d := range p.devices {
		d.Stop()
	}
}

// reset brings every device back to power-on.
func (p *pciDevices) reset() error {
	var errs []error
	for _, d := range p.devices {
		d.Stop()
		errs = append(errs, d.SetState(d.powerOn), d.Resume())
	}
	return errors.Join(errs...)
}
