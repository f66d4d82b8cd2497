package balloon

import (
	"errors"
	"fmt"
	"time"
)

// ErrState is wrapped when a saved state does not fit.
var ErrState = errors.New("saved balloon state does not fit")

// State is what outlives the process, apart from the transport's part. It is
// plain data from a file or a peer: nothing in it is trusted. The statistics
// are asked for anew.
type State struct {
	// TargetPages and ActualPages are in units of [PageSize].
	TargetPages, ActualPages uint32
	StatsInterval            time.Duration
}

// maxStatsInterval is longer than anybody means.
const maxStatsInterval = 24 * time.Hour

// State returns what must be saved. The device must be paused.
func (d *Device) State() State {
	d.mu.Lock()
	defer d.mu.Unlock()
	return State{TargetPages: d.target, ActualPages: d.actual, StatsInterval: d.interval}
}

// SetState restores s into a device that was never started.
func (d *Device) SetState(s State) error {
	if s.StatsInterval < 0 || s.StatsInterval > maxStatsInterval {
		return fmt.Errorf("%w: statistics every %s", ErrState, s.StatsInterval)
	}
	if err := d.SetStatsInterval(s.StatsInterval); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.target, d.actual = s.TargetPages, s.ActualPages
	return nil
}
