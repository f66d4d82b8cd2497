package vmproc

import (
	"context"

	"ditto.vm/migration/live"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
)

// ArriveVM is the [Arriver] of real machines.
func ArriveVM(ctx context.Context, o live.Offer, cfg config.Config, s Surroundings) (Arriving, error) {
	opts := vmm.Options{Log: s.Log, Console: s.Console, NetLog: &lineLog{log: s.Log}, Version: s.Version}
	if s.Handed != nil {
		opts.Handed = &vmm.Handed{Memory: s.Handed.Memory}
	}
	a, err := vmm.PrepareArrival(ctx, o, cfg, opts)
	if err != nil {
		return nil, advise(err)
	}
	return arrivingVM{a, newVM(a.VM(), s, disksOf(cfg, false))}, nil
}

// arrivingVM is a *vmm.VM on its way.
type arrivingVM struct {
	*vmm.Arrival
	vm *vm
}

// Machine implements [Arriving].
func (a arrivingVM) Machine() Machine { return arrived{a.vm} }

// arrived is a machine that runs already when its process begins to serve it.
type arrived struct{ *vm }

// Start has nothing left to do.
func (arrived) Start(context.Context) error { return nil }
