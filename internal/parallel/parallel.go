// Package parallel shares rows of work among goroutines.
package parallel

import (
	"context"
	"sync"
	"sync/atomic"
)

// Do calls do with every number below n, in ascending order of their begin, on so
// many goroutines, until one call fails or the context ends; do learns which
// goroutine calls it. It returns when all have returned, with the first error or
// the context's cause.
func Do(ctx context.Context, workers, n int, do func(ctx context.Context, worker, i int) error) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var next atomic.Int64
	var wg sync.WaitGroup
	for w := range max(1, min(workers, n)) {
		wg.Go(func() {
			for ctx.Err() == nil {
				i := int(next.Add(1)) - 1
				if i >= n {
					return
				}
				if err := do(ctx, w, i); err != nil {
					cancel(err)
					return
				}
			}
		})
	}
	wg.Wait()
	return context.Cause(ctx)
}
