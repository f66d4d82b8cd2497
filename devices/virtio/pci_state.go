package virtio

import (
	"errors"
	"fmt"

	"ditto.vm/devices/pci"
)

// ErrState is wrapped when a saved state does not fit the device that it is
// restored into.
var ErrState = errors.New("saved virtio state does not fit")

// PCIState is everything of a virtio PCI function that outlives the process,
// apart from what the device type adds. It is plain data from a file or a
// peer: nothing in it is trusted.
type PCIState struct {
	Endpoint            pci.EndpointState
	Status              uint8
	DeviceFeatureSelect uint32
	DriverFeatureSelect uint32
	DriverFeatures      uint64
	QueueSelect         uint16
	ConfigVector        uint16
	ISR                 uint8
	Generation          uint8
	Queues              []QueueState
}

// QueueState is where a queue lies and stands.
type QueueState struct {
	QueueConfig
	Enabled bool
	Vector  uint16
}

// State returns what must be saved. The device must be paused.
func (d *PCIDevice) State() (PCIState, error) {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if !d.paused {
		return PCIState{}, fmt.Errorf("virtio %s: state is saved only when paused", d.dev.ID())
	}
	endpoint := d.endpoint.State() // its lock comes before mu
	d.mu.Lock()
	defer d.mu.Unlock()
	r := &d.registers
	s := PCIState{
		Endpoint:            endpoint,
		Status:              r.status,
		DeviceFeatureSelect: r.deviceFeatureSelect,
		DriverFeatureSelect: r.driverFeatureSelect,
		DriverFeatures:      r.driverFeatures,
		QueueSelect:         r.queueSelect,
		ConfigVector:        uint16(d.vectors[len(d.sizes)].Load()),
		ISR:                 uint8(d.isr.Load()),
		Generation:          uint8(d.generation.Load()),
	}
	for i, q := range r.queues {
		config := q.QueueConfig
		if d.running && d.active[i] != nil {
			if n := d.active[i].InFlight(); n != 0 {
				return PCIState{}, fmt.Errorf("virtio %s: queue %d has %d chains in flight after a pause", d.dev.ID(), i, n)
			}
			config = d.active[i].Config()
		}
		s.Queues = append(s.Queues, QueueState{config, q.enabled, uint16(d.vectors[i].Load())})
	}
	return s, nil
}

// SetState restores s into a device that was built alike, is on the bus and
// was never started. It checks everything first; after an error the device is
// as before. Resume then starts it.
func (d *PCIDevice) SetState(s PCIState) error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if d.running {
		return fmt.Errorf("virtio %s: state is restored only into a stopped device", d.dev.ID())
	}
	if err := d.checkState(s); err != nil {
		return fmt.Errorf("virtio %s: %w", d.dev.ID(), err)
	}
	// The endpoint's lock comes before mu: its BARs connect doorbells.
	if err := d.endpoint.SetState(s.Endpoint); err != nil {
		return fmt.Errorf("virtio %s: %w", d.dev.ID(), err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clearRegisters()
	r := &d.registers
	r.status = s.Status
	r.deviceFeatureSelect, r.driverFeatureSelect = s.DeviceFeatureSelect, s.DriverFeatureSelect
	r.driverFeatures = s.DriverFeatures
	r.queueSelect = s.QueueSelect
	for i, q := range s.Queues {
		r.queues[i] = queueRegisters{q.QueueConfig, q.Enabled}
		d.vectors[i].Store(uint32(q.Vector))
	}
	d.vectors[len(d.sizes)].Store(uint32(s.ConfigVector))
	d.isr.Store(uint32(s.ISR))
	d.generation.Store(uint32(s.Generation))
	d.paused = true
	return nil
}

// checkState refuses what this device could not have saved.
func (d *PCIDevice) checkState(s PCIState) error {
	switch {
	case len(s.Queues) != len(d.sizes):
		return fmt.Errorf("%w: %d queues, want %d", ErrState, len(s.Queues), len(d.sizes))
	case s.Status&^(statusDriverBits|StatusNeedsReset) != 0:
		return fmt.Errorf("%w: status %#x", ErrState, s.Status)
	case s.Status&StatusDriverOK != 0 && s.Status&StatusFeaturesOK == 0:
		return fmt.Errorf("%w: status %#x", ErrState, s.Status)
	case s.Status&StatusFeaturesOK != 0 && s.DriverFeatures&^d.offered != 0:
		return fmt.Errorf("%w: features %#x are not offered here", ErrState, s.DriverFeatures&^d.offered)
	case !d.validVector(s.ConfigVector):
		return fmt.Errorf("%w: configuration vector %d", ErrState, s.ConfigVector)
	}
	for i, q := range s.Queues {
		if q.Size == 0 || q.Size > d.sizes[i] || q.Size&(q.Size-1) != 0 || !d.validVector(q.Vector) {
			return fmt.Errorf("%w: queue %d has size %d, vector %d", ErrState, i, q.Size, q.Vector)
		}
		if !q.Enabled || s.Status&StatusDriverOK == 0 || s.Status&StatusNeedsReset != 0 {
			continue
		}
		if _, err := NewQueue(d.config.Memory, i, q.QueueConfig, QueueHooks{}); err != nil {
			return fmt.Errorf("%w: %w", ErrState, err)
		}
	}
	return nil
}

func (d *PCIDevice) validVector(v uint16) bool {
	return v == noVector || int(v) < d.msix.Vectors()
}
