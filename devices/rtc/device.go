package rtc

import (
	"time"

	"ditto.vm/devices"
)

// The register window: index port and data port.
const (
	Port = 0x70
	Size = 2
)

// Config connects the clock to the machine.
type Config struct {
	Line devices.Line
	Now  func() time.Time // the host's clock; the guest sees it in UTC
}

// Device is the clock. All methods may be called from any goroutine.
type Device struct {
	config Config
}

// New makes a clock that shows config.Now.
func New(config Config) *Device { return &Device{config: config} }

// ReadRegister implements [devices.Handler].
func (d *Device) ReadRegister(offset uint64, data []byte) {}

// WriteRegister implements [devices.Handler].
func (d *Device) WriteRegister(offset uint64, data []byte) {}

// Close stops the alarm timer.
func (d *Device) Close() error { return nil }
