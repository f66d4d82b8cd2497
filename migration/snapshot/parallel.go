package snapshot

import (
	"context"
	"sync"
	"sync/atomic"
)

// parallel calls do with every number below n, in ascending order of their
// begin, on so many goroutines, until one call fails or the context ends.
func parallel(ctx context.Context, workers, n int, do func(ctx context.Context, worker, i int) error) error {
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

// turns lets workers of [parallel] do a part of their work in order.
type turns struct {
	mu   sync.Mutex
	cond sync.Cond
	next int
}

func newTurns() *turns {
	t := &turns{}
	t.cond.L = &t.mu
	return t
}

// take waits until all before i had their turn, and calls do. It fails with
// the context's cause when that ends first.
func (t *turns) take(ctx context.Context, i int, do func()) error {
	stop := context.AfterFunc(ctx, func() {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.cond.Broadcast()
	})
	defer stop()
	t.mu.Lock()
	defer t.mu.Unlock()
	for t.next != i {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		t.cond.Wait()
	}
	do()
	t.next++
	t.cond.Broadcast()
	return nil
}
