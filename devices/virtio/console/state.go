package console

import (
	"errors"
	"fmt"
)

// ErrState is wrapped when a saved state does not fit.
var ErrState = errors.New("saved console state does not fit")

// State is what outlives the process, apart from the transport's part. It is
// plain data from a file or a peer: nothing in it is trusted.
type State struct {
	Cols, Rows uint16
	// Input was written and not yet taken by the guest.
	Input []byte
}

// State returns what must be saved. The device must be paused. Output that the
// guest has sent is the host's already: flush it with [Device.Flush].
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	s := State{Cols: d.cols, Rows: d.rows, Input: make([]byte, d.in.used)}
	d.in.peek(s.Input)
	return s
}

// SetState restores s into a device that was never started.
func (d *Device) SetState(s State) error {
	if len(s.Input) > inputSize {
		return fmt.Errorf("%w: %d bytes of input, more than %d", ErrState, len(s.Input), inputSize)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.cols, d.rows = s.Cols, s.Rows
	d.in = newRing(inputSize)
	d.in.put(s.Input)
	return nil
}
