package rtc

import (
	"sync"
	"time"

	"ditto.vm/devices"
)

// The register window: index port and data port.
const (
	Port = 0x70
	Size = 2
)

// Registers (MC146818A data sheet, figure 12). The century has no number of
// its own in the data sheet; 0x32 is where PCs keep it.
const (
	regSeconds      = 0x0
	regSecondsAlarm = 0x1
	regMinutes      = 0x2
	regMinutesAlarm = 0x3
	regHours        = 0x4
	regHoursAlarm   = 0x5
	regWeekday      = 0x6
	regDay          = 0x7
	regMonth        = 0x8
	regYear         = 0x9
	regA            = 0xa
	regB            = 0xb
	regC            = 0xc
	regD            = 0xd
	regCentury      = 0x32

	timeRegisters = 10
	ramSize       = 128
	indexMask     = ramSize - 1
)

// Register bits.
const (
	aUpdating  = 1 << 7
	aRateMask  = 0x0f
	aReset     = 0x26 // 32768 Hz time base, 1024 Hz periodic
	bSet       = 1 << 7
	bPeriodic  = 1 << 6
	bAlarm     = 1 << 5
	bUpdate    = 1 << 4
	bBinary    = 1 << 2
	b24Hour    = 1 << 1
	bReset     = b24Hour
	bInterrupt = bPeriodic | bAlarm | bUpdate // the flags of C have the same places
	cRequest   = 1 << 7
	dValid     = 1 << 7
)

// updateTime is how long before the next second UIP is set (data sheet: an
// update starts 244 us after UIP at the earliest).
const updateTime = 244 * time.Microsecond

// Config connects the clock to the machine.
type Config struct {
	Line devices.Line
	Now  func() time.Time // the host's clock; the guest sees it in UTC
}

// Device is the clock. All methods may be called from any goroutine.
type Device struct {
	config Config

	mu       sync.Mutex // guards all below, and the level of the line
	timer    *time.Timer
	paused   bool
	closed   bool
	asserted bool // level of the line

	index  uint8
	ram    [ramSize]byte // registers A and B, the alarm, CMOS RAM
	flags  uint8         // register C without the request bit
	offset time.Duration // what the guest's clock is ahead of the host's
	set    clock         // what the guest writes while SET stops the clock
	seen   time.Time     // guest time up to which flags are computed
}

// New makes a clock that shows config.Now.
func New(config Config) *Device {
	d := &Device{config: config}
	d.ram[regA], d.ram[regB] = aReset, bReset
	d.seen = d.now()
	d.timer = time.AfterFunc(time.Hour, d.expire)
	d.timer.Stop()
	return d
}

// Close stops the timer.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed = true
	d.timer.Stop()
	return nil
}

// Pause stops interrupts until Resume, which raises those that became due.
func (d *Device) Pause() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused = true
	d.timer.Stop()
}

// Resume undoes Pause.
func (d *Device) Resume() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.paused = false
	d.update()
}

// Reset does what the chip's RESET pin does: interrupts are disabled and their
// flags cleared. Time and CMOS RAM have a battery.
func (d *Device) Reset() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ram[regB] &^= bInterrupt
	d.flags, d.index, d.seen = 0, 0, d.now()
	d.update()
}

// ReadRegister implements [devices.Handler].
func (d *Device) ReadRegister(offset uint64, data []byte) {
	for i := range data {
		data[i] = 0xff
	}
	if offset != 1 || len(data) != 1 {
		return // the index port cannot be read
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	data[0] = d.read(d.index)
}

// WriteRegister implements [devices.Handler].
func (d *Device) WriteRegister(offset uint64, data []byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, v := range data {
		switch offset + uint64(i) {
		case 0:
			d.index = v & indexMask
		case 1:
			d.write(d.index, v)
		}
	}
}

// read returns a register. Preconditions: d.mu is held.
func (d *Device) read(register uint8) uint8 {
	if field, ok := timeField(register); ok {
		if d.stopped() {
			return d.set[field]
		}
		return d.format().encodeTime(d.now())[field]
	}
	switch register {
	case regA:
		v := d.ram[regA]
		if d.updating() {
			v |= aUpdating
		}
		return v
	case regC:
		d.update()
		v := d.registerC()
		d.flags = 0
		d.update()
		return v
	case regD:
		return dValid
	}
	return d.ram[register]
}

// write changes a register. Preconditions: d.mu is held.
func (d *Device) write(register, v uint8) {
	if field, ok := timeField(register); ok {
		d.writeTime(field, v)
		return
	}
	switch register {
	case regA:
		d.ram[regA] = v &^ aUpdating
	case regB:
		d.writeB(v)
	case regC, regD: // read-only
		return
	default:
		d.ram[register] = v
	}
	d.update()
}

// timeField returns which field of the time a register shows.
func timeField(register uint8) (int, bool) {
	switch register {
	case regSeconds, regMinutes, regHours, regWeekday, regDay, regMonth, regYear:
		return int(register), true
	case regCentury:
		return centuryField, true
	}
	return 0, false
}

// writeTime changes one field of the time.
func (d *Device) writeTime(field int, v uint8) {
	if d.stopped() {
		d.set[field] = v
		return
	}
	c := d.format().encodeTime(d.now())
	c[field] = v
	d.setTime(d.format().decodeTime(c))
}

// writeB stops and starts the clock and enables interrupts.
func (d *Device) writeB(v uint8) {
	old := d.ram[regB]
	switch {
	case v&bSet != 0 && old&bSet == 0:
		d.set = d.format().encodeTime(d.now())
	case v&bSet == 0 && old&bSet != 0:
		d.ram[regB] = v // the time is in the new format
		d.setTime(d.format().decodeTime(d.set))
	}
	if v&bSet != 0 {
		v &^= bUpdate // data sheet: SET clears UIE
	}
	d.ram[regB] = v
}

// setTime makes the guest's clock show t now.
func (d *Device) setTime(t time.Time) {
	d.offset = min(max(t.Sub(d.config.Now()), -maxOffset), maxOffset)
	d.seen = d.now()
	d.update()
}

// now returns the guest's time.
func (d *Device) now() time.Time { return d.config.Now().Add(d.offset).UTC() }

func (d *Device) stopped() bool { return d.ram[regB]&bSet != 0 }

func (d *Device) format() format {
	return format{binary: d.ram[regB]&bBinary != 0, hour24: d.ram[regB]&b24Hour != 0}
}

// updating reports whether the time is about to change.
func (d *Device) updating() bool {
	return !d.stopped() && time.Second-time.Duration(d.now().Nanosecond()) <= updateTime
}

// registerC returns the flags with the request bit.
func (d *Device) registerC() uint8 {
	v := d.flags
	if v&d.ram[regB]&bInterrupt != 0 {
		v |= cRequest
	}
	return v
}
