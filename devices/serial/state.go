package serial

import (
	"fmt"
	"slices"
)

// State is what a snapshot keeps of the device. What the guest has sent is not
// part of it: it is on its way to Output, and Flush waits for it.
type State struct {
	IER, LCR, MCR, FCR, SCR uint8
	Divisor                 uint16
	ModemDelta              uint8 // MSR bits 0 to 3
	Overrun                 bool
	TransmitReady           bool // the THRE interrupt is pending
	Received                []byte
	Breaks                  []bool // which of Received are break conditions
}

// State returns the device's state. The VM is paused.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := State{
		IER: d.ier, LCR: d.lcr, MCR: d.mcr, FCR: d.fcr, SCR: d.scr,
		Divisor: d.divisor, ModemDelta: d.delta, Overrun: d.overrun,
		// A transmitter that is full now is empty where this is restored.
		TransmitReady: d.transmitReady || !d.out.ready(),
	}
	for _, r := range d.received {
		s.Received = append(s.Received, r.data)
		s.Breaks = append(s.Breaks, r.flags != 0)
	}
	return s
}

// SetState restores the device from s, which may come from a peer or a file,
// and sets the line to match. The VM is paused.
func (d *Device) SetState(s State) error {
	if err := s.check(); err != nil {
		return fmt.Errorf("serial: %w", err)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ier, d.lcr, d.mcr, d.fcr, d.scr = s.IER, s.LCR, s.MCR, s.FCR, s.SCR
	d.divisor, d.delta, d.overrun, d.transmitReady = s.Divisor, s.ModemDelta, s.Overrun, s.TransmitReady
	d.received = slices.Grow(d.received[:0], fifoSize)
	for i, b := range s.Received {
		r := received{data: b}
		if s.Breaks[i] {
			r.flags = lsrBreak
		}
		d.received = append(d.received, r)
	}
	// A fresh line is deasserted, whatever this device did to the old one.
	d.asserted = d.cause() != iirNone
	d.line.SetLevel(d.asserted)
	d.changed.Broadcast()
	return nil
}

// check validates a state against what the registers can hold.
func (s *State) check() error {
	limit := fifoSize
	if s.FCR&fcrEnable == 0 {
		limit = 1
	}
	switch {
	case s.IER&^ierMask != 0:
		return fmt.Errorf("state has IER %#x", s.IER)
	case s.MCR&^mcrMask != 0:
		return fmt.Errorf("state has MCR %#x", s.MCR)
	case s.FCR&^fcrKept != 0 || s.FCR != 0 && s.FCR&fcrEnable == 0:
		return fmt.Errorf("state has FCR %#x", s.FCR)
	case s.ModemDelta&^msrDeltaMask != 0:
		return fmt.Errorf("state has modem status changes %#x", s.ModemDelta)
	case len(s.Received) > limit || len(s.Breaks) != len(s.Received):
		return fmt.Errorf("state has %d received bytes and %d flags, the receiver holds %d", len(s.Received), len(s.Breaks), limit)
	}
	return nil
}
