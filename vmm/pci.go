package vmm

import (
	"context"
	"errors"
	"fmt"

	"ditto.vm/devices/pci"
	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// pciDevices is the PCI bus and what sits on it.
type pciDevices struct {
	bus     *pci.Bus
	devices []*virtio.PCIDevice
	powerOn []virtio.PCIState // of each device, for a restart
	info    []DeviceInfo
	threads int // worker goroutines of all devices
}

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
	return nil
}

// addVirtio puts a virtio device into the lowest free slot. threads is how many
// workers it runs.
func (m *VM) addVirtio(dev virtio.Device, name, detail string, threads int) error {
	d, err := virtio.NewPCIDevice(dev, virtio.PCIConfig{
		Memory:    m.mem,
		MSIs:      m.irqs,
		Doorbells: &doorbells{vm: m.kvm},
		Log:       m.log.With("dev", name),
	})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.cleanup.add(d.Close)
	slot, err := m.pci.bus.Add(d)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	d.Pause()
	state, err := d.State()
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if err := d.Resume(); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	m.pci.devices = append(m.pci.devices, d)
	m.pci.powerOn = append(m.pci.powerOn, state)
	m.pci.info = append(m.pci.info, DeviceInfo{Slot: slot, Kind: dev.ID().String(), Detail: detail})
	m.pci.threads += threads
	return nil
}

// workers is how many goroutines serve queues.
func (p *pciDevices) workers() int { return p.threads }

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
	for i, d := range p.devices {
		d.Stop()
		errs = append(errs, d.SetState(p.powerOn[i]), d.Resume())
	}
	return errors.Join(errs...)
}
