package ged

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"ditto.vm/devices"
	"ditto.vm/memory"
)

// The register window.
const (
	// Size of the window in bytes: a whole page.
	Size = 0x1000

	// RegEvents is the offset of the pending events.
	RegEvents = 0x000
	// RegSleepControl is the offset of the sleep control register.
	RegSleepControl = 0x010
	// RegSleepStatus is the offset of the sleep status register.
	RegSleepStatus = 0x011
	// RegReset is the offset of the reset register.
	RegReset = 0x012

	// ResetValue is what resets the machine when written to RegReset.
	ResetValue = 0x42
)

// Event bits of RegEvents. The others are free for CPU, memory and PCI
// hot-plug.
const (
	EventPowerButton = 1 << 0
	EventVMGenID     = 1 << 1

	knownEvents = EventPowerButton | EventVMGenID
)

const (
	sleepEnable    = 1 << 5
	sleepTypeShift = 2
	sleepTypeMask  = 7
	// SleepTypeOff is the sleep type of S5 that the \_S5 object must name.
	SleepTypeOff = 5
)

// GenerationIDSize is the size of the VM Generation ID in bytes.
const GenerationIDSize = 16

// Config connects the device to the machine.
type Config struct {
	Line devices.Line
	// Memory holds the VM Generation ID at GenerationID. GenerationID 0
	// means that the machine has none.
	Memory       *memory.Space
	GenerationID memory.GPA

	OnPowerOff func() // the guest entered S5
	OnReset    func() // the guest wrote the reset register
}

// Device is the register window and the VM Generation ID. All methods may be
// called from any goroutine.
type Device struct {
	config Config

	mu     sync.Mutex // guards all below, and the level of the line
	events uint32
	id     [GenerationIDSize]byte
}

// New makes the device with a fresh VM Generation ID and writes the ID to
// guest memory.
func New(config Config) (*Device, error) {
	if config.Line == nil || config.OnPowerOff == nil || config.OnReset == nil {
		return nil, errors.New("ged: line and callbacks are required")
	}
	d := &Device{config: config}
	if config.GenerationID == 0 {
		return d, nil
	}
	if config.GenerationID%8 != 0 || config.Memory == nil || !config.Memory.Contains(config.GenerationID, GenerationIDSize) {
		return nil, fmt.Errorf("ged: VM generation ID at %s is not 8-byte aligned guest RAM", config.GenerationID)
	}
	if err := d.renew(); err != nil {
		return nil, err
	}
	return d, nil
}

// PressPowerButton tells the guest that its power button was pressed.
func (d *Device) PressPowerButton() { d.raise(EventPowerButton) }

// ChangeGenerationID gives the VM a new random ID, writes it to guest memory
// and notifies the guest. It is due after every restore and clone, before the
// vCPUs run.
func (d *Device) ChangeGenerationID() error {
	if d.config.GenerationID == 0 {
		return nil
	}
	if err := d.renew(); err != nil {
		return err
	}
	d.raise(EventVMGenID)
	return nil
}

// ReadRegister implements [devices.Handler].
func (d *Device) ReadRegister(offset uint64, data []byte) {
	clear(data)
	if offset != RegEvents || len(data) != 4 {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	binary.LittleEndian.PutUint32(data, d.events)
	d.events = 0
	d.config.Line.SetLevel(false)
}

// WriteRegister implements [devices.Handler].
func (d *Device) WriteRegister(offset uint64, data []byte) {
	if len(data) != 1 {
		return
	}
	switch v := data[0]; offset {
	case RegSleepControl:
		if v&sleepEnable != 0 && v>>sleepTypeShift&sleepTypeMask == SleepTypeOff {
			d.config.OnPowerOff()
		}
	case RegReset:
		if v == ResetValue {
			d.config.OnReset()
		}
	}
}

// Reset drops pending events, as a machine reset does. The VM Generation ID
// stays, and is written again because the guest's firmware area may have been.
func (d *Device) Reset() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events = 0
	d.config.Line.SetLevel(false)
	return d.writeID()
}

// raise makes events pending and asserts the line.
func (d *Device) raise(events uint32) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events |= events
	d.config.Line.SetLevel(true)
}

// renew draws a new ID and writes it to guest memory.
func (d *Device) renew() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, _ = rand.Read(d.id[:]) // never fails, since Go 1.24
	return d.writeID()
}

// writeID writes the ID to guest memory. Preconditions: d.mu is held.
func (d *Device) writeID() error {
	if d.config.GenerationID == 0 {
		return nil
	}
	if err := d.config.Memory.WriteAt(d.id[:], d.config.GenerationID); err != nil {
		return fmt.Errorf("ged: write the VM generation ID: %w", err)
	}
	return nil
}
