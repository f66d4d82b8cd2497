package snapshot

import (
	"context"
	"sync"
)

// turns lets workers of [parallel.Do] do a part of their work in order.
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
