package parallel

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
)

func TestDoAll(t *testing.T) {
	for _, workers := range []int{-1, 0, 1, 3, 100} {
		var calls [50]atomic.Int32
		err := Do(t.Context(), workers, len(calls), func(_ context.Context, worker, i int) error {
			if worker < 0 || worker >= max(1, workers) {
				t.Errorf("worker %d of %d", worker, workers)
			}
			calls[i].Add(1)
			return nil
		})
		if err != nil {
			t.Error(err)
		}
		for i := range calls {
			if n := calls[i].Load(); n != 1 {
				t.Errorf("%d workers: %d was done %d times", workers, i, n)
			}
		}
	}
	if err := Do(t.Context(), 2, 0, func(context.Context, int, int) error { return errors.New("called") }); err != nil {
		t.Error(err)
	}
}

func TestDoStops(t *testing.T) {
	broken := errors.New("broken")
	var calls atomic.Int32
	err := Do(t.Context(), 4, 1000, func(ctx context.Context, _, i int) error {
		calls.Add(1)
		if i == 10 {
			return broken
		}
		if i > 10 {
			<-ctx.Done() // it ends with the failure
		}
		return nil
	})
	if !errors.Is(err, broken) || calls.Load() > 16 {
		t.Errorf("%v after %d calls", err, calls.Load())
	}
	ctx, cancel := context.WithCancelCause(t.Context())
	cancel(broken)
	if err := Do(ctx, 2, 10, func(context.Context, int, int) error { t.Error("called"); return nil }); !errors.Is(err, broken) {
		t.Error(err)
	}
}
