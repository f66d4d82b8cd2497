package virtio

import (
	"errors"
	"fmt"
	"time"
)

// The states of the function, as seen from the device status and from the VM:
//
//	          DRIVER_OK                Pause
//	stopped ------------> running <------------> paused
//	   ^                     |       Resume        |
//	   +---- status := 0 ----+                     |
//	   +---------- SetState of a saved one --------+

// logInterval is how often a driver's faults are logged at most.
const logInterval = 10 * time.Second

// writeStatus follows the driver through its initialization (virtio 1.2
// 3.1.1). Status bits are only ever added, until a write of 0 resets.
func (d *PCIDevice) writeStatus(value uint8) {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if value == 0 {
		d.reset()
		return
	}
	d.mu.Lock()
	added := value & statusDriverBits &^ d.registers.status
	if added&StatusFeaturesOK != 0 && d.checkFeatures() != nil {
		// The driver reads the status again and sees the refusal.
		added &^= StatusFeaturesOK
	}
	start := added&StatusDriverOK != 0
	if start && (d.registers.status|added)&StatusFeaturesOK == 0 {
		added, start = added&^StatusDriverOK, false
	}
	d.registers.status |= added
	d.mu.Unlock()
	if start {
		if err := d.start(); err != nil {
			d.startFailed(err)
		}
	}
}

// checkFeatures says why the driver's features cannot be accepted.
//
// Preconditions: mu is held.
func (d *PCIDevice) checkFeatures() error {
	f := d.registers.driverFeatures
	if unknown := f &^ d.offered; unknown != 0 {
		return fmt.Errorf("features %#x were not offered", unknown)
	}
	if f&FeatureVersion1 == 0 {
		return errors.New("VIRTIO_F_VERSION_1 is not accepted")
	}
	return nil
}

// start attaches the queues where the registers say and starts the device.
//
// Preconditions: lifecycle is held; the status has DRIVER_OK.
func (d *PCIDevice) start() error {
	activation, err := d.activation()
	if err != nil {
		return err
	}
	if err := d.dev.Start(activation); err != nil {
		return fmt.Errorf("start: %w", err)
	}
	d.running, d.active = true, activation.Queues
	return nil
}

// startFailed tells the driver that the device does not run, and the log why:
// a queue out of memory is the driver's fault, all else is the VMM's.
func (d *PCIDevice) startFailed(err error) {
	if !errors.Is(err, ErrQueue) {
		d.config.Log.Error("device does not start", "err", err)
	}
	d.mu.Lock()
	epoch := d.epoch
	d.mu.Unlock()
	d.needsReset(epoch, err)
}

// activation makes the queues and callbacks for one run of the device.
func (d *PCIDevice) activation() (Activation, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	epoch := d.epoch
	a := Activation{
		Features: d.registers.driverFeatures,
		Queues:   make([]*Queue, len(d.sizes)),
		Memory:   d.config.Memory,
		Log:      d.config.Log,
	}
	a.ConfigChanged = func() { d.configChanged(epoch) }
	a.NeedsReset = func(reason error) { d.needsReset(epoch, reason) }
	for i, q := range d.registers.queues {
		if !q.enabled {
			continue
		}
		var err error
		a.Queues[i], err = NewQueue(d.config.Memory, i, q.QueueConfig, QueueHooks{
			Features:  a.Features,
			KickFD:    d.kicks[i],
			Interrupt: func() { d.interrupt(i, 1) },
			Failed:    a.NeedsReset,
		})
		if err != nil {
			return Activation{}, err
		}
	}
	return a, nil
}

// reset stops the device and clears the registers. Register accesses of other
// vCPUs meanwhile see the old values.
//
// Preconditions: lifecycle is held, mu is not.
func (d *PCIDevice) reset() {
	d.stop()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clearRegisters()
}

// stop joins the device's workers.
//
// Preconditions: lifecycle is held, mu is not.
func (d *PCIDevice) stop() {
	if d.running {
		d.dev.Stop()
	}
	d.running, d.active = false, nil
}

// Pause finishes what is in flight and parks the device. vCPUs are paused
// before. It may be called again while paused.
func (d *PCIDevice) Pause() {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if d.running && !d.paused {
		d.dev.Pause()
	}
	d.paused = true
}

// Resume goes on after Pause, or starts a device whose state was restored. A
// restored device looks at every queue and interrupts for each and for its
// configuration once, because a kick or an interrupt may have been lost on the
// way.
func (d *PCIDevice) Resume() error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.paused = false
	if d.running {
		d.dev.Resume()
		return nil
	}
	d.mu.Lock()
	start := d.registers.status&(StatusDriverOK|StatusNeedsReset) == StatusDriverOK
	d.mu.Unlock()
	if !start {
		return nil
	}
	if err := d.start(); err != nil {
		d.startFailed(err)
		return fmt.Errorf("virtio %s: %w", d.dev.ID(), err)
	}
	for i, q := range d.active {
		if q != nil {
			d.interrupt(i, 1)
		}
	}
	d.interrupt(len(d.sizes), 2)
	return nil
}

// Stop ends the device's work and joins its workers, before a SetState or at
// the machine's end. The registers stay as they are.
func (d *PCIDevice) Stop() {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.stop()
}

// configChanged is [Activation.ConfigChanged] for one run of the device.
func (d *PCIDevice) configChanged(epoch uint64) {
	d.mu.Lock()
	current := d.epoch == epoch
	d.mu.Unlock()
	if current {
		d.generation.Add(1)
		d.interrupt(len(d.sizes), 2)
	}
}

// needsReset is [Activation.NeedsReset] for one run of the device.
func (d *PCIDevice) needsReset(epoch uint64, reason error) {
	d.mu.Lock()
	if d.epoch != epoch {
		d.mu.Unlock()
		return
	}
	first := d.registers.status&StatusNeedsReset == 0
	d.registers.status |= StatusNeedsReset
	d.resets++
	d.unlogged++
	now := time.Now()
	times, log := d.unlogged, !now.Before(d.nextLog)
	if log {
		d.nextLog, d.unlogged = now.Add(logInterval), 0
	}
	d.mu.Unlock()
	if log {
		d.config.Log.Warn("driver broke the protocol, device needs a reset", "err", reason, "times", times)
	}
	if first {
		d.interrupt(len(d.sizes), 2)
	}
}
