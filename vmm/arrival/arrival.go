package arrival

import (
	"context"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
)

// Watched is an arrival whose process hears of it.
type Watched struct {
	live.Arrival
	// Constructed is called when the machine is made, and paused. Its error ends
	// the migration, before the commit point.
	Constructed func() error
	// Running is called when the guest runs.
	Running func()
}

// Construct implements [live.Arrival].
func (w Watched) Construct(ctx context.Context, sections []state.Section, missing *memory.PageSet, source memory.PageSource) error {
	if err := w.Arrival.Construct(ctx, sections, missing, source); err != nil {
		return err
	}
	return w.Constructed()
}

// Run implements [live.Arrival].
func (w Watched) Run(ctx context.Context) error {
	if err := w.Arrival.Run(ctx); err != nil {
		return err
	}
	w.Running()
	return nil
}
