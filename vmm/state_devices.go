package vmm

import (
	"context"
	"encoding/binary"
	"fmt"
	"time"

	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/console"
	virtionet "ditto.vm/devices/virtio/net"
	"ditto.vm/migration/state"
)

// blkConfigBlockSize is the offset of blk_size in a disk's configuration (virtio
// 1.2 5.2.4).
const blkConfigBlockSize = 20

// blockSize is what the guest was told, in bytes.
func blockSize(d *blk.Device) int {
	var b [4]byte
	d.ReadConfig(blkConfigBlockSize, b[:])
	return int(binary.LittleEndian.Uint32(b[:]))
}

// message writes the section of a device down. Preconditions: it is paused.
func (d *virtioDevice) message() (*state.Virtio, error) {
	s, err := d.State()
	if err != nil {
		return nil, err
	}
	x := state.NewVirtio(d.dev.ID(), s)
	switch dev := d.dev.(type) {
	case *blk.Device:
		x.Device = &state.Virtio_Block{Block: state.NewBlock(dev.State(), dev.Size(), blockSize(dev))}
	case *virtionet.Device:
		x.Device = &state.Virtio_Net{Net: state.NewNet(dev.State())}
	case *balloon.Device:
		own := state.NewBalloon(dev.State())
		own.Held = d.held.saved()
		x.Device = &state.Virtio_Balloon{Balloon: own}
	case *console.Device:
		x.Device = &state.Virtio_Console{Console: state.NewConsole(dev.State())}
	}
	return x, nil
}

// restore gives a device its section. newMAC keeps the address that a network
// device was made with. Preconditions: the device was never started.
func (d *virtioDevice) restore(x *state.Virtio, newMAC bool) error {
	s, err := x.State(d.dev.ID())
	if err != nil {
		return err
	}
	switch dev := d.dev.(type) {
	case *blk.Device:
		err = restoreDisk(dev, x.GetBlock())
	case *virtionet.Device:
		err = restoreNet(dev, x.GetNet(), newMAC)
	case *balloon.Device:
		if err = dev.SetState(x.GetBalloon().State()); err == nil {
			err = d.held.restore(x.GetBalloon().GetHeld())
		}
	case *console.Device:
		var own console.State
		if own, err = x.GetConsole().State(); err == nil {
			err = dev.SetState(own)
		}
	}
	if err != nil {
		return err
	}
	return d.SetState(s)
}

// restoreDisk checks that the disk is as large as the guest knows it.
func restoreDisk(dev *blk.Device, x *state.Block) error {
	size, block := uint64(dev.Size()), uint32(blockSize(dev))
	if x.GetSize() != size || x.GetBlockSize() != block {
		return fmt.Errorf("%w: its disk has %d bytes in blocks of %d, and this one %d in blocks of %d",
			ErrOtherMachine, x.GetSize(), x.GetBlockSize(), size, block)
	}
	dev.SetState(x.State())
	return nil
}

func restoreNet(dev *virtionet.Device, x *state.Net, newMAC bool) error {
	s, err := x.State()
	if err != nil {
		return err
	}
	if newMAC {
		s.MAC = dev.State().MAC
	}
	return dev.SetState(s)
}

// announce lets the network learn where the guest is now.
func (p *pciDevices) announce() {
	for _, d := range p.devices {
		if dev, ok := d.dev.(*virtionet.Device); ok {
			_ = dev.Announce() // a device without a driver has nothing to announce
		}
	}
}

// A guest that has moved is announced so many times more, at growing distances:
// a bridge may lose a frame, or learn only when a port is forwarding.
const (
	moreAnnouncements   = 4
	announcementFirst   = 50 * time.Millisecond
	announcementGrowing = 100 * time.Millisecond
)

// announceAgain repeats the announcements until ctx ends. It alone changes how
// many are left.
func (m *VM) announceAgain(ctx context.Context) {
	for b := &m.background; b.announcements > 0; b.announcements-- {
		timer := time.NewTimer(announcementFirst + time.Duration(moreAnnouncements-b.announcements)*announcementGrowing)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		m.pci.announce()
	}
}

// message writes the platform's section down, with its timer as it was when the
// other clocks were read.
func (p *platform) message(pmTimer uint32) *state.Platform {
	return &state.Platform{
		Serial: state.NewSerial(p.serial.State()), Rtc: state.NewRTC(p.rtc.State()),
		Events: state.NewEvents(p.ged.State()), PmTimer: pmTimer,
	}
}

// restore gives the platform's devices their states, and their lines the levels.
func (p *platform) restore(x *state.Platform) error {
	serial, err := x.GetSerial().State()
	if err != nil {
		return fmt.Errorf("serial port: %w", err)
	}
	clock, err := x.GetRtc().State()
	if err != nil {
		return fmt.Errorf("clock: %w", err)
	}
	events, err := x.GetEvents().State()
	if err != nil {
		return fmt.Errorf("event device: %w", err)
	}
	if err := p.serial.SetState(serial); err != nil {
		return err
	}
	if err := p.rtc.SetState(clock); err != nil {
		return err
	}
	return p.ged.SetState(events)
}
