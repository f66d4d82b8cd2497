package ged

import "fmt"

// State is what a snapshot keeps of the device.
type State struct {
	Events       uint32
	GenerationID [GenerationIDSize]byte
}

// State returns the device's state. The VM is paused.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return State{Events: d.events, GenerationID: d.id}
}

// SetState restores the device from s, which may come from a peer or a file,
// and sets the line to match. The VM is paused.
func (d *Device) SetState(s State) error {
	if s.Events&^knownEvents != 0 {
		return fmt.Errorf("ged: state has unknown events %#x", s.Events)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.events, d.id = s.Events, s.GenerationID
	d.config.Line.SetLevel(d.events != 0)
	return d.writeID()
}
