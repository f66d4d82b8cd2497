package serial

import (
	"context"
	"io"
	"log/slog"
	"sync"

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
	Output io.Writer    // gets what the guest sends, from one goroutine; may block
	Logger *slog.Logger // nil for none
}

// Device is the UART. All methods may be called from any goroutine.
type Device struct {
	line devices.Line
	out  transmitter

	mu       sync.Mutex // guards all below, and the level of the line
	changed  *sync.Cond // the receive FIFO has room, or the device is closed
	closed   bool
	paused   bool
	asserted bool // level of the line

	ier, lcr, mcr, fcr, scr uint8
	divisor                 uint16
	delta                   uint8 // MSR bits 0 to 3
	overrun                 bool
	// transmitReady is the THRE interrupt: set when the transmitter becomes
	// ready, cleared by reading IIR while it is the cause.
	transmitReady bool
	received      []received // the receive FIFO, oldest first
}

// received is one entry of the receive FIFO.
type received struct {
	data  byte
	flags uint8 // LSR bits that belong to the byte
}

// New makes a UART in its reset state and starts its output goroutine.
func New(config Config) *Device {
	d := &Device{line: config.Line}
	d.changed = sync.NewCond(&d.mu)
	d.resetLocked()
	d.out.start(config.Output, config.Logger, d.transmitterReady)
	return d
}

// Close writes what the guest has sent, stops the output goroutine and makes
// WriteInput fail. It waits for Output. Registers keep answering; what the
// guest sends after is lost.
func (d *Device) Close() error {
	d.mu.Lock()
	d.closed = true
	d.changed.Broadcast()
	d.mu.Unlock()
	d.out.stop()
	return nil
}

// Pause makes input wait until Resume, so that the registers stay as they are
// while the state is saved, and waits until what the guest has sent was written
// to Output. The vCPUs are paused.
func (d *Device) Pause(ctx context.Context) error {
	d.setPaused(true)
	return d.Flush(ctx)
}

// Resume undoes Pause.
func (d *Device) Resume() { d.setPaused(false) }

func (d *Device) setPaused(paused bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused = paused
	d.changed.Broadcast()
}

// Reset puts the registers into their reset state, as a machine reset does.
// Output that is on its way stays on its way.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.resetLocked()
	d.updateLine()
	d.changed.Broadcast()
}

func (d *Device) resetLocked() {
	d.ier, d.lcr, d.mcr, d.fcr, d.scr, d.delta = 0, 0, mcrOUT2, 0, 0, 0
	d.divisor = resetDivisor
	d.overrun, d.transmitReady = false, false
	d.received = d.received[:0]
}

// ReadRegister implements [devices.Handler]. A wide access reads consecutive
// registers.
func (d *Device) ReadRegister(offset uint64, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i := range data {
		data[i] = d.read(uint8(offset+uint64(i)) % Size)
	}
}

// WriteRegister implements [devices.Handler].
func (d *Device) WriteRegister(offset uint64, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, v := range data {
		d.write(uint8(offset+uint64(i))%Size, v)
	}
}

// read returns a register. Preconditions: d.mu is held.
func (d *Device) read(register uint8) uint8 {
	dlab := d.lcr&lcrDLAB != 0
	switch register {
	case regData:
		if dlab {
			return uint8(d.divisor)
		}
		return d.readData()
	case regIER:
		if dlab {
			return uint8(d.divisor >> 8)
		}
		return d.ier
	case regIIR:
		return d.readIIR()
	case regLCR:
		return d.lcr
	case regMCR:
		return d.mcr
	case regLSR:
		return d.readLSR()
	case regMSR:
		v := d.modemLines() | d.delta
		d.delta = 0
		d.updateLine()
		return v
	}
	return d.scr
}

// write changes a register. Preconditions: d.mu is held.
func (d *Device) write(register, v uint8) {
	dlab := d.lcr&lcrDLAB != 0
	switch register {
	case regData:
		if dlab {
			d.divisor = d.divisor&0xff00 | uint16(v)
			return
		}
		d.writeData(v)
	case regIER:
		if dlab {
			d.divisor = d.divisor&0x00ff | uint16(v)<<8
			return
		}
		d.writeIER(v & ierMask)
	case regIIR:
		d.writeFCR(v)
	case regLCR:
		d.lcr = v
	case regMCR:
		d.writeMCR(v & mcrMask)
	case regSCR:
		d.scr = v
	}
}

// readIIR returns the cause of the interrupt. Naming the transmitter takes
// that interrupt back. Preconditions: d.mu is held.
func (d *Device) readIIR() uint8 {
	cause := d.cause()
	if cause == iirTransmit {
		d.transmitReady = false
		d.updateLine()
	}
	if d.fcr&fcrEnable != 0 {
		cause |= iirFIFO
	}
	return cause
}

// cause returns the pending interrupt of the highest priority. Preconditions:
// d.mu is held.
func (d *Device) cause() uint8 {
	switch n := len(d.received); {
	case d.ier&ierLine != 0 && d.lineErrors() != 0:
		return iirLine
	case d.ier&ierReceive != 0 && n >= d.trigger():
		return iirReceive
	case d.ier&ierReceive != 0 && n > 0:
		return iirTimeout
	case d.ier&ierTransmit != 0 && d.transmitReady:
		return iirTransmit
	case d.ier&ierModem != 0 && d.delta != 0:
		return iirModem
	}
	return iirNone
}

// updateLine sets the interrupt line to what the registers say. Preconditions:
// d.mu is held.
func (d *Device) updateLine() {
	if want := d.cause() != iirNone; want != d.asserted {
		d.asserted = want
		d.line.SetLevel(want)
	}
}

// writeIER enables interrupts. Enabling the transmitter's while it is ready
// raises it at once; Linux tests for that.
func (d *Device) writeIER(v uint8) {
	if enabled := v &^ d.ier; enabled&ierTransmit != 0 && d.out.ready() {
		d.transmitReady = true
	}
	d.ier = v
	d.updateLine()
}

// writeFCR sets up the FIFOs. Switching them on or off empties them.
func (d *Device) writeFCR(v uint8) {
	if v&fcrClearReceive != 0 || (v^d.fcr)&fcrEnable != 0 {
		d.received = d.received[:0]
		d.changed.Broadcast()
	}
	d.fcr = 0
	if v&fcrEnable != 0 {
		d.fcr = v & fcrKept
	}
	d.updateLine()
}

// writeMCR sets the modem control lines. In loopback mode they are what the
// modem status lines show.
func (d *Device) writeMCR(v uint8) {
	old := d.modemLines()
	d.mcr = v
	now := d.modemLines()
	rising := now &^ old & msrRI
	d.delta |= ((old ^ now) &^ rising) >> msrLinesShift & msrDeltaMask
	d.updateLine()
	d.changed.Broadcast()
}

// modemLines returns MSR bits 4 to 7.
func (d *Device) modemLines() uint8 {
	if d.mcr&mcrLoop == 0 {
		return msrAlwaysOnline
	}
	var v uint8
	for _, wire := range [...]struct{ from, to uint8 }{{mcrRTS, msrCTS}, {mcrDTR, msrDSR}, {mcrOUT1, msrRI}, {mcrOUT2, msrDCD}} {
		if d.mcr&wire.from != 0 {
			v |= wire.to
		}
	}
	return v
}
