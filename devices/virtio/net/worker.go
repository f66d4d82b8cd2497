package net

import (
	"errors"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// run is the device between Start and Stop.
type run struct {
	virtio.Activation
	device      *Device
	backend     Backend
	receiver    receiver
	transmitter transmitter
}

// Start implements [virtio.Device].
func (d *Device) Start(a virtio.Activation) error {
	r := &run{Activation: a, device: d, backend: d.config.Backend}
	if !d.restored {
		d.offloads = a.Features & guestOffloads
	}
	d.offloads &= a.Features
	d.restored = false
	d.filter.vlanFilter = a.Has(featureCtrlQueue | featureCtrlVLAN)
	if err := r.backend.SetOffloads(d.offloads); err != nil {
		return err
	}
	if err := r.receiver.init(r); err != nil {
		return err
	}
	if err := r.transmitter.init(r); err != nil {
		r.receiver.worker.Stop()
		return err
	}
	d.run = r
	d.mu.Lock()
	d.activation = r
	if a.Has(featureStatus) {
		d.configChanged = a.ConfigChanged
	}
	d.mu.Unlock()
	r.receiver.worker.Start()
	r.transmitter.worker.Start()
	return nil
}

// Stop implements [virtio.Device].
func (d *Device) Stop() {
	d.mu.Lock()
	d.configChanged, d.activation = nil, nil
	d.mu.Unlock()
	d.run.transmitter.worker.Stop()
	d.run.receiver.worker.Stop()
	d.run = nil
	d.reset()
}

// Pause implements [virtio.Device].
func (d *Device) Pause() {
	d.run.transmitter.worker.Pause()
	d.run.receiver.worker.Pause()
}

// Resume implements [virtio.Device].
func (d *Device) Resume() {
	d.run.receiver.worker.Resume()
	d.run.transmitter.worker.Resume()
}

// publishEvery is how many frames are given to the driver at once while more
// are waiting: few enough not to add latency, enough to share an interrupt.
const publishEvery = 16

// gone is what a worker does when the backend ended: it forgets the descriptor
// and takes the link down.
func (r *run) gone(w *virtio.Worker, err error) {
	if fd := r.backend.FD(); fd >= 0 {
		// It is watched until now.
		_ = w.RemoveFD(fd)
	}
	if r.device.LinkUp() {
		r.Log.Warn("network link is down", "err", err)
	}
	r.device.lost()
}

// nowhere is the [Backend] of a device without one.
type nowhere struct{}

func (nowhere) FD() int                       { return -1 }
func (nowhere) Offloads() uint64              { return 0 }
func (nowhere) SetOffloads(uint64) error      { return nil }
func (nowhere) Receive([][]byte) (int, error) { return 0, unix.EAGAIN }
func (nowhere) Send([][]byte) error           { return ErrDropped }
func (nowhere) Flush() error                  { return nil }

func again(err error) bool { return errors.Is(err, unix.EAGAIN) }
