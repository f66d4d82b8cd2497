package rng

import (
	"ditto.vm/devices/virtio"
)

// queueSize is the ring's largest size. A driver has one or two buffers
// waiting.
const queueSize = 64

// Source fills some of p with random bytes and returns how many. It does not
// block for long.
type Source func(p []byte) (int, error)

// Config is what the device is made from.
type Config struct {
	// Source of randomness; nil means getrandom(2).
	Source Source
}

// Device is a virtio entropy device. It implements [virtio.Device].
type Device struct {
	source Source
	run    *run // while started; lifecycle calls only
}

// New makes a device.
func New(config Config) *Device {
	d := &Device{source: config.Source}
	if d.source == nil {
		d.source = getrandom
	}
	return d
}

// ID implements [virtio.Device].
func (d *Device) ID() virtio.ID { return virtio.IDEntropy }

// Features implements [virtio.Device]: there are none (virtio 1.2 5.4.3).
func (d *Device) Features() uint64 { return 0 }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 { return []uint16{queueSize} }

// ReadConfig implements [virtio.Device]: there is no configuration.
func (d *Device) ReadConfig(_ uint64, data []byte) { clear(data) }

// WriteConfig implements [virtio.Device].
func (d *Device) WriteConfig(uint64, []byte) {}

// Start implements [virtio.Device].
func (d *Device) Start(a virtio.Activation) error {
	r, err := newRun(a, d.source)
	if err != nil {
		return err
	}
	d.run = r
	return nil
}

// Stop implements [virtio.Device].
func (d *Device) Stop() {
	d.run.worker.Stop()
	d.run = nil
}

// Pause implements [virtio.Device].
func (d *Device) Pause() { d.run.worker.Pause() }

// Resume implements [virtio.Device].
func (d *Device) Resume() { d.run.worker.Resume() }
