package blk

// State is what a disk remembers beyond its queues and the transport.
type State struct {
	// Writeback says that the driver has the write cache on.
	Writeback bool
}

// State returns what must be saved. The device must be paused.
func (d *Device) State() State { return State{Writeback: d.writeback.Load()} }

// SetState restores it, before the device is started.
func (d *Device) SetState(s State) { d.writeback.Store(s.Writeback) }
