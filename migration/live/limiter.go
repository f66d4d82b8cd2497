package live

import (
	"context"
	"sync"
	"time"
)

// limiter keeps what all connections send together below a rate.
type limiter struct {
	rate uint64 // bytes a second, 0 for no limit

	mu    sync.Mutex
	ready time.Time // when what was sent so far is within the rate
}

// maxBurst is how much may be sent at once after a while of silence, as time.
const maxBurst = 20 * time.Millisecond

// wait returns when n more bytes may be sent, or the context ends.
func (l *limiter) wait(ctx context.Context, n int) error {
	if l == nil || l.rate == 0 {
		return nil
	}
	l.mu.Lock()
	now := time.Now()
	if earliest := now.Add(-maxBurst); l.ready.Before(earliest) {
		l.ready = earliest
	}
	l.ready = l.ready.Add(time.Duration(float64(n) / float64(l.rate) * float64(time.Second)))
	until := l.ready.Sub(now)
	l.mu.Unlock()
	if until <= 0 {
		return nil
	}
	timer := time.NewTimer(until)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
