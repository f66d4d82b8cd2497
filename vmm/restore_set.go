package vmm

import (
	"context"
	"errors"
	"sync"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

// recordTime is how long a guest must have run for what it touched to be its
// working set.
const recordTime = 10 * time.Second

// recording is the working set on its way to its file.
type recording struct {
	mu   sync.Mutex    // guards what follows, and restored.set
	left time.Duration // that the guest is to run yet
	ran  bool          // the guest has run
}

// beginRecord begins to record the working set, if there is a file for it.
func (r *restored) beginRecord() {
	r.record.left = recordTime
	if r.set != nil && r.missing != nil {
		r.missing.Record()
	}
}

// recordFor waits until the guest has run for long enough and writes the working
// set, and reports whether that is so. Meanwhile nothing is fetched that the guest
// does not ask for, or nobody would know that it does.
func (r *restored) recordFor(ctx context.Context) bool {
	r.record.mu.Lock()
	left, set := r.record.left, r.set
	r.record.ran = true
	r.record.mu.Unlock()
	if set == nil {
		return true
	}
	began := time.Now()
	timer := time.NewTimer(left)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		r.record.mu.Lock()
		defer r.record.mu.Unlock()
		r.record.left -= time.Since(began)
		return false
	case <-timer.C:
	}
	if err := r.endRecord(); err != nil {
		r.log.Warn("what the guest touched first is not recorded for the next restore", "err", err)
	}
	return true
}

// endRecord writes the working set, once. A machine that was restored and never
// ran leaves none.
func (r *restored) endRecord() error {
	r.record.mu.Lock()
	defer r.record.mu.Unlock()
	if r.set == nil {
		return nil
	}
	set := r.set
	r.set = nil
	var err error
	if pages := r.touched(); pages != nil && pages.Count() > 0 {
		err = r.snapshot.WriteWorkingSet(set, pages)
	}
	return errors.Join(err, set.Close())
}

// touched returns the pages that were touched, nil when the guest has not run.
func (r *restored) touched() *memory.PageSet {
	if r.mem == nil || !r.record.ran {
		return nil
	}
	var pages *memory.PageSet
	if r.missing != nil {
		pages = r.missing.Recorded()
	}
	if pages == nil {
		pages = r.mem.NewPageSet()
	}
	err := r.mem.FilesTouched(func(touched memory.Range) { pages.Add(touched.Start, touched.Size) })
	if err != nil {
		r.log.Warn("what the guest touched first is not known", "err", err)
	}
	return pages
}

// Prefetching is done by so many at once, in pieces of that size: storage likes
// several requests, and the guest wants a core.
const (
	prefetchHands = 4
	prefetchPiece = 2 << 20
)

// beginPrefetch begins to bring in what an earlier restore touched first.
func (r *restored) beginPrefetch() {
	runs, err := r.snapshot.ReadWorkingSet()
	switch {
	case errors.Is(err, snapshot.ErrNoWorkingSet):
		r.log.Info("nothing is prefetched: no earlier restore of this snapshot was recorded")
		return
	case err != nil:
		r.log.Warn("nothing is prefetched", "err", err)
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	r.stop, r.prefetched = stop, make(chan struct{})
	go func() {
		defer close(r.prefetched)
		err := eachPiece(ctx, prefetchHands, pieces(runs, prefetchPiece), func(piece memory.Range) error { return r.bring(ctx, piece) })
		if err != nil && ctx.Err() == nil {
			r.log.Warn("not all is prefetched", "err", err)
		}
	}()
}

// bring brings pages into memory.
func (r *restored) bring(ctx context.Context, piece memory.Range) error {
	if err := r.mem.Prefault(piece); err != nil {
		return err
	}
	if r.missing == nil {
		return nil
	}
	return r.missing.Fetch(ctx, piece)
}
