package names

import (
	"context"
	"errors"
	"runtime"
	"sync"
	"sync/atomic"

	"ditto.vm/memory"
)

// ProveAll proves at once what names of blocks can be proven, of the layers that
// are not immutable: what names those, only the table keeps true. Everything is
// armed, see [memory.Rearm], and Run stands still. A layer that cannot be read
// proves nothing; the first such error is returned, when all is done.
func (p *Prover) ProveAll(ctx context.Context, workers int) error {
	layers := p.table.Layers()
	wanted := func(l LayerID) bool { return int(l) < len(layers) && !layers[l].Immutable }
	if workers <= 0 {
		workers = runtime.NumCPU()
	}
	var next atomic.Int64
	var wg sync.WaitGroup
	errs := make([]error, min(workers, len(p.watches)))
	for i := range errs {
		wg.Go(func() {
			proof := newProof(p.table, p.space)
			proof.wanted = wanted
			for n := int(next.Add(1)) - 1; n < len(p.watches) && ctx.Err() == nil; n = int(next.Add(1)) - 1 {
				if count := p.table.count(n); count.used() == count.vouched() {
					continue
				}
				if err := proof.prove(p.frame(n)); err != nil && errs[i] == nil {
					errs[i] = err
				}
			}
		})
	}
	wg.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return errors.Join(errs...)
}

// Take takes over what somebody else has armed and gives back: frames that have
// proven names are the prover's, and the others are disarmed. Trackers that an
// inactive prover does not need are switched off. Run stands still.
func (p *Prover) Take() error {
	var errs []error
	for _, r := range p.space.Regions() {
		if !p.Active() {
			errs = append(errs, p.tracker.Disarm(r.Range))
			continue
		}
		if p.tracker.Kind() != memory.TrackerWPAsync {
			continue // KVM's log is on anyway
		}
		var run memory.Range // to be disarmed
		flush := func() {
			if run.Size > 0 {
				errs = append(errs, p.tracker.Disarm(run))
			}
			run = memory.Range{}
		}
		p.eachFrame(r.Range, func(frame memory.Range, n int) {
			w := &p.watches[n]
			switch {
			case p.table.count(n).vouched() > 0:
				w.tracked = true
				flush()
			default:
				*w = watch{activity: w.activity}
				if run.Size == 0 {
					run.Start = frame.Start
				}
				run.Size += frame.Size
			}
		})
		flush()
	}
	return errors.Join(errs...)
}
