package names

import (
	"fmt"
	"sync"

	"ditto.vm/memory"
)

// Watched is the tracker of a VM whose memory is named. Nothing that the tracker
// is told or tells gets lost for the table: no write is forgotten, by whomever it
// is collected or armed over, before the names that it makes false have died.
// So whoever tracks a named guest does it through this one, and it is the
// Space's observer.
//
//	Arm, Disarm, Remapped   proven names become provisional: their proof was
//	                        about an older arming
//	Collect                 reported pages lose their proven names, provisional
//	                        ones stay as hints
//	HostWrite               names die at once
type Watched struct {
	memory.Tracker
	table *Table

	mu  sync.Mutex // makes forgetting a write and dropping its name one
	set *memory.PageSet
}

// Watch joins a tracker with the table. The caller installs it with
// [memory.Space.SetObserver].
func Watch(s *memory.Space, tracker memory.Tracker, t *Table) *Watched {
	return &Watched{Tracker: tracker, table: t, set: s.NewPageSet()}
}

// HostWrite implements [memory.WriteObserver].
func (w *Watched) HostWrite(gpa memory.GPA, n uint64) {
	w.Tracker.HostWrite(gpa, n)
	w.table.HostWrite(gpa, n)
}

// Arm implements [memory.Tracker].
func (w *Watched) Arm(r memory.Range) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.Tracker.Arm(r)
	w.table.demote(r)
	return err
}

// Disarm implements [memory.Tracker].
func (w *Watched) Disarm(r memory.Range) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.Tracker.Disarm(r)
	w.table.demote(r)
	return err
}

// Remapped implements [memory.Tracker].
func (w *Watched) Remapped(r memory.Range) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	err := w.Tracker.Remapped(r)
	w.table.demote(r)
	return err
}

// Collect implements [memory.Tracker].
func (w *Watched) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.collect(r, into, mode)
}

// collect drops the proven names of what the tracker reports, and adds it to
// into unless that is nil.
//
// Preconditions: mu is held.
func (w *Watched) collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	err := w.Tracker.Collect(r, w.set, mode)
	if err != nil {
		// It says what it may have forgotten; what else it knows is lost.
		w.set.Add(r.Start, r.Size)
		err = fmt.Errorf("names of written pages: %w", err)
	}
	for run := range w.set.Runs() {
		w.table.dropWritten(run)
		if into != nil {
			into.Add(run.Start, run.Size)
		}
	}
	w.set.Clear()
	return err
}

// settle drops the names of the pages of r that were written since they were
// proven, and leaves the tracker as it is.
func (w *Watched) settle(r memory.Range) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.collect(r, nil, memory.Peek)
}

// dropWritten drops the names of r that are proven or being proven.
func (t *Table) dropWritten(r memory.Range) {
	dropped := uint64(0)
	t.eachVouched(r, func(page uint32, w word) {
		vouched := func(w word) (word, bool) { return 0, w.vouched() }
		for w.vouched() {
			if t.leaveChain(page, w, vouched) {
				dropped++
				return
			}
			w = t.load(page)
		}
	})
	add(&t.stats.droppedWritten, dropped)
}

// demote makes the proven names of r provisional, and lets proofs that are under
// way fail.
func (t *Table) demote(r memory.Range) {
	demoted := uint64(0)
	t.eachVouched(r, func(page uint32, w word) {
		for w.vouched() {
			if t.swap(page, w, w&^vouchedMask) {
				demoted++
				return
			}
			w = t.load(page)
		}
	})
	add(&t.stats.demoted, demoted)
}

// eachVouched calls f for every page of r that is proven or being proven, and
// passes quickly over frames without.
func (t *Table) eachVouched(r memory.Range, f func(page uint32, w word)) {
	for at := r.Start; at < r.End(); {
		end := min(at&^(memory.LargeFrameSize-1)+memory.LargeFrameSize, r.End())
		if page, ok := t.page(at); ok && t.count(int(page>>frameShift)).vouched() > 0 {
			t.eachPage(memory.Range{Start: at, Size: uint64(end - at)}, func(page uint32, w word) {
				if w.vouched() {
					f(page, w)
				}
			})
		}
		at = end
	}
}
