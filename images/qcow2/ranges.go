package qcow2

import "sync"

// span is a range of the disk in bytes.
type span struct{ start, end int64 }

// ranges lets one operation at a time change what clusters of the disk are
// mapped to.
type ranges struct {
	mu      sync.Mutex
	changed sync.Cond
	busy    []span
}

// lock waits until no other holds a part of the span.
func (r *ranges) lock(s span) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for r.overlaps(s) {
		r.changed.Wait()
	}
	r.busy = append(r.busy, s)
}

func (r *ranges) overlaps(s span) bool {
	for _, b := range r.busy {
		if s.start < b.end && b.start < s.end {
			return true
		}
	}
	return false
}

func (r *ranges) unlock(s span) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, b := range r.busy {
		if b == s {
			r.busy[i] = r.busy[len(r.busy)-1]
			r.busy = r.busy[:len(r.busy)-1]
			break
		}
	}
	r.changed.Broadcast()
}
