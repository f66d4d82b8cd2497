// Package debugexit is the port through which a bare-metal payload ends its
// machine with a status, like QEMU's isa-debug-exit at the same port: QEMU's
// process then exits with status<<1 | 1.
//
// It is present only in machines that run payloads. It has no state.
package debugexit

import "encoding/binary"

// The register window: QEMU's -device isa-debug-exit,iobase=0xf4,iosize=4.
const (
	Port = 0xf4
	Size = 4
)

// Device is the port.
type Device struct {
	onExit func(status uint32)
}

// New makes the device. onExit runs on the vCPU thread that wrote the port and
// must not block.
func New(onExit func(status uint32)) *Device { return &Device{onExit: onExit} }

// ReadRegister implements devices.Handler: the port reads as zero.
func (d *Device) ReadRegister(_ uint64, data []byte) { clear(data) }

// WriteRegister implements devices.Handler: a write at the start of the window
// ends the machine.
func (d *Device) WriteRegister(offset uint64, data []byte) {
	if offset != 0 || len(data) > Size {
		return
	}
	var v [Size]byte
	copy(v[:], data)
	d.onExit(binary.LittleEndian.Uint32(v[:]))
}
