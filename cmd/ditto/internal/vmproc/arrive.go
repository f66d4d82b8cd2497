package vmproc

import (
	"context"
	"fmt"

	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// ArriveVM is the [Arriver] of real machines.
func ArriveVM(context.Context, live.Offer, config.Config, Surroundings) (Arriving, error) {
	return nil, fmt.Errorf("machines cannot be received: %w", api.ErrNotSupported)
}
