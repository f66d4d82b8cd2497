package pci

import (
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"ditto.vm/devices"
)

// ErrState is wrapped when a saved state does not fit the function that it is
// restored into.
var ErrState = errors.New("saved PCI state does not fit")

// EndpointState is a function's configuration space and MSI-X as saved.
type EndpointState struct {
	Config [ConfigSize]byte
	MSIX   *MSIXState // nil for a function without MSI-X
}

// MSIXState is the table and the pending bits as the guest sees them. Enable
// and mask bits are in the configuration space.
type MSIXState struct {
	Table   []byte
	Pending []byte
}

// State returns what must be saved of the endpoint.
func (e *Endpoint) State() EndpointState {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := EndpointState{Config: e.config}
	if e.msix != nil {
		s.MSIX = e.msix.state()
	}
	return s
}

// SetState restores a state into an endpoint that was built alike. Everything
// that the guest cannot write must agree, except bytes that a capability's
// hooks own. On an error the endpoint is as before.
func (e *Endpoint) SetState(s EndpointState) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if (e.msix == nil) != (s.MSIX == nil) {
		return fmt.Errorf("%w: MSI-X on one side only", ErrState)
	}
	for i := range s.Config {
		if (s.Config[i]^e.config[i])&^e.writable[i] != 0 {
			return fmt.Errorf("%w: configuration byte %#x is %#x, want %#x", ErrState, i, s.Config[i], e.config[i])
		}
	}
	if e.msix != nil {
		if err := e.msix.setState(s.MSIX); err != nil {
			return err
		}
	}
	e.config = s.Config
	e.followBARs()
	e.followMSIX()
	return nil
}

func (m *MSIX) state() *MSIXState {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &MSIXState{Table: slices.Clone(m.table), Pending: slices.Clone(m.pba)}
}

// setState restores table and pending bits. Nothing counts as routed.
func (m *MSIX) setState(s *MSIXState) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(s.Table) != len(m.table) || len(s.Pending) != len(m.pba) {
		return fmt.Errorf("%w: %d bytes of MSI-X table, want %d", ErrState, len(s.Table), len(m.table))
	}
	for v := range m.msis {
		if binary.LittleEndian.Uint32(s.Table[v*msixEntrySize+12:])&^msixMasked != 0 {
			return fmt.Errorf("%w: MSI-X vector %d has reserved bits set", ErrState, v)
		}
	}
	for v := len(m.msis); v < len(s.Pending)*8; v++ {
		if s.Pending[v/8]&(1<<(v%8)) != 0 {
			return fmt.Errorf("%w: MSI-X vector %d is pending and does not exist", ErrState, v)
		}
	}
	copy(m.table, s.Table)
	copy(m.pba, s.Pending)
	for v := range m.routed {
		m.routed[v] = devices.MSIMessage{Masked: true}
	}
	return nil
}

// State is what the bus itself remembers; each function has a state of its
// own.
type State struct {
	// Address is the last value written to port CF8.
	Address uint32
	// Bridge is the host bridge in slot 0.
	Bridge EndpointState
}

// State returns the bus's own state.
func (b *Bus) State() State {
	b.mu.Lock()
	defer b.mu.Unlock()
	return State{Address: b.address, Bridge: b.slots[0].State()}
}

// SetState restores the bus's own state. On an error it is as before.
func (b *Bus) SetState(s State) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if err := b.slots[0].SetState(s.Bridge); err != nil {
		return fmt.Errorf("host bridge: %w", err)
	}
	b.address = s.Address
	return nil
}
