package state

import (
	"time"

	"ditto.vm/devices/ged"
	"ditto.vm/devices/pci"
	"ditto.vm/devices/rtc"
	"ditto.vm/devices/serial"
)

// NewSerial writes down the serial port.
func NewSerial(s serial.State) *Serial {
	breaks := make([]byte, len(s.Breaks))
	for i, is := range s.Breaks {
		if is {
			breaks[i] = 1
		}
	}
	return &Serial{
		Ier: uint32(s.IER), Lcr: uint32(s.LCR), Mcr: uint32(s.MCR), Fcr: uint32(s.FCR), Scr: uint32(s.SCR),
		Divisor: uint32(s.Divisor), ModemDelta: uint32(s.ModemDelta),
		Overrun: s.Overrun, TransmitReady: s.TransmitReady,
		Received: s.Received, Breaks: breaks,
	}
}

// State returns what the serial port is given.
func (x *Serial) State() (serial.State, error) {
	var n narrow
	s := serial.State{
		IER: n.u8("IER", x.GetIer()), LCR: n.u8("LCR", x.GetLcr()), MCR: n.u8("MCR", x.GetMcr()),
		FCR: n.u8("FCR", x.GetFcr()), SCR: n.u8("SCR", x.GetScr()),
		Divisor:    n.u16("divisor", x.GetDivisor()),
		ModemDelta: n.u8("modem status", x.GetModemDelta()),
		Overrun:    x.GetOverrun(), TransmitReady: x.GetTransmitReady(),
		Received: x.GetReceived(),
	}
	for _, b := range x.GetBreaks() {
		if b > 1 {
			n.failed("break flag %#x", b)
		}
		s.Breaks = append(s.Breaks, b == 1)
	}
	return s, n.err
}

// NewRTC writes down the real-time clock.
func NewRTC(s rtc.State) *RTC {
	return &RTC{
		Index: uint32(s.Index), Ram: s.RAM[:], Flags: uint32(s.Flags),
		OffsetNs: int64(s.Offset), Set: s.Set[:],
	}
}

// State returns what the real-time clock is given.
func (x *RTC) State() (rtc.State, error) {
	var n narrow
	s := rtc.State{
		Index: n.u8("index", x.GetIndex()), Flags: n.u8("flags", x.GetFlags()),
		Offset: time.Duration(x.GetOffsetNs()),
	}
	n.fill("RTC memory", s.RAM[:], x.GetRam())
	n.fill("RTC time", s.Set[:], x.GetSet())
	return s, n.err
}

// NewEvents writes down the device of power and generation events.
func NewEvents(s ged.State) *Events {
	return &Events{Pending: s.Events, GenerationId: s.GenerationID[:]}
}

// State returns what the device of events is given.
func (x *Events) State() (ged.State, error) {
	var n narrow
	s := ged.State{Events: x.GetPending()}
	n.fill("generation ID", s.GenerationID[:], x.GetGenerationId())
	return s, n.err
}

// NewPCI writes down the bus.
func NewPCI(s pci.State) *PCI {
	return &PCI{Address: s.Address, BridgeConfig: s.Bridge.Config[:]}
}

// State returns what the bus is given.
func (x *PCI) State() (pci.State, error) {
	var n narrow
	s := pci.State{Address: x.GetAddress()}
	n.fill("host bridge", s.Bridge.Config[:], x.GetBridgeConfig())
	return s, n.err
}
