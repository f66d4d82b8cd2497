package serial

import (
	"context"
	"errors"
	"io"

	"ditto.vm/devices"
)

// The register window.
const (
	COM1 = 0x3f8
	// Size of the window in bytes.
	Size = 8
)

// Config connects the UART to the machine.
type Config struct {
	Line   devices.Line
	Output io.Writer // gets what the guest sends; may block
}

// Device is the UART. All methods may be called from any goroutine.
type Device struct {
	config Config
}

// New makes a UART in its reset state and starts its output goroutine.
func New(config Config) *Device { return &Device{config: config} }

// ReadRegister implements [devices.Handler].
func (d *Device) ReadRegister(offset uint64, data []byte) {}

// WriteRegister implements [devices.Handler].
func (d *Device) WriteRegister(offset uint64, data []byte) {}

// WriteInput feeds p to the guest. It blocks while the receive FIFO is full,
// until ctx is done or the device is closed, and returns how many bytes went
// in.
func (d *Device) WriteInput(ctx context.Context, p []byte) (int, error) {
	return 0, errors.ErrUnsupported
}

// Flush waits until everything that the guest has sent was written to Output.
func (d *Device) Flush(ctx context.Context) error { return nil }

// Close writes what the guest has sent, stops the output goroutine and makes
// WriteInput fail.
func (d *Device) Close() error { return nil }
