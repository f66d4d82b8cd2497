package rtc

import (
	"fmt"
	"time"
)

// maxOffset bounds how far the guest's clock may be from the host's, below
// where time.Duration ends.
const maxOffset = 290 * 365 * 24 * time.Hour

// State is what a snapshot keeps of the device. The time itself is not part of
// it: a restored guest sees the host's clock with the guest's own offset.
type State struct {
	Index  uint8
	RAM    [ramSize]byte
	Flags  uint8         // register C without the request bit
	Offset time.Duration // what the guest's clock is ahead of the host's
	Set    [timeRegisters + 1]byte
}

// State returns the device's state. The VM is paused.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return State{Index: d.index, RAM: d.ram, Flags: d.flags, Offset: d.offset, Set: d.set}
}

// SetState restores the device from s, which may come from a peer or a file.
// The VM is paused.
func (d *Device) SetState(s State) error {
	switch {
	case s.Index&^indexMask != 0:
		return fmt.Errorf("rtc: state has index %#x", s.Index)
	case s.Flags&^bInterrupt != 0:
		return fmt.Errorf("rtc: state has flags %#x", s.Flags)
	case s.RAM[regA]&aUpdating != 0:
		return fmt.Errorf("rtc: state has register A %#x", s.RAM[regA])
	case s.Offset > maxOffset || s.Offset < -maxOffset:
		return fmt.Errorf("rtc: state has a clock offset of %s", s.Offset)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.index, d.ram, d.flags, d.offset, d.set = s.Index, s.RAM, s.Flags, s.Offset, s.Set
	d.seen = d.now()
	d.asserted = false // a fresh line is
	d.update()
	return nil
}
