package net

import (
	"errors"
	"fmt"
	"slices"
)

// ErrState is wrapped when a saved state does not fit.
var ErrState = errors.New("saved network state does not fit")

// State is what outlives the process, apart from the transport's part. It is
// plain data from a file or a peer: nothing in it is trusted. Whether the link
// is up is the new host's affair.
type State struct {
	MAC MAC
	// Offloads are the guest's offload bits in effect, as in the features.
	Offloads uint64
	// Announce says that the driver was asked to announce itself and has not.
	Announce bool
	// Modes are the receive modes by command of the RX class: promiscuous,
	// all multicast, all unicast, no multicast, no unicast, no broadcast.
	Modes [numModes]bool
	// Unicast and Multicast are the address tables; when one was too long,
	// Full says so and every frame of the kind passes.
	Unicast, Multicast         []MAC
	UnicastFull, MulticastFull bool
	// VLANs has a bit for each VLAN ID that passes.
	VLANs [maxVLAN / 64]uint64
}

// State returns what must be saved. The device must be paused or stopped.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	f := &d.filter
	return State{
		MAC: d.mac, Offloads: d.offloads, Announce: d.announce,
		Modes:   f.modes,
		Unicast: slices.Clone(f.unicast), UnicastFull: f.unicastFull,
		Multicast: slices.Clone(f.multicast), MulticastFull: f.multicastFull,
		VLANs: f.vlans,
	}
}

// SetState restores s into a device that was never started.
func (d *Device) SetState(s State) error {
	switch {
	case s.MAC.multicast() || s.MAC == MAC{}:
		return fmt.Errorf("%w: %x is not a unicast address", ErrState, s.MAC)
	case s.Offloads&^(d.features&guestOffloads) != 0:
		return fmt.Errorf("%w: offloads %#x are not offered here", ErrState, s.Offloads)
	case len(s.Unicast) > maxTable || len(s.Multicast) > maxTable:
		return fmt.Errorf("%w: %d and %d filtered addresses, more than %d", ErrState, len(s.Unicast), len(s.Multicast), maxTable)
	}
	d.filter = filter{
		modes:   s.Modes,
		unicast: slices.Clone(s.Unicast), unicastFull: s.UnicastFull,
		multicast: slices.Clone(s.Multicast), multicastFull: s.MulticastFull,
		vlans: s.VLANs,
	}
	d.offloads, d.restored = s.Offloads, true
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mac, d.announce = s.MAC, s.Announce
	return nil
}
