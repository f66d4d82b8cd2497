package trackertest_test

import (
	"fmt"
	"sync"
	"testing"

	"ditto.vm/guest/payload"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

var kinds = []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog, memory.TrackerKVMRing, memory.TrackerNone}

// TestTrackers holds every tracker to its contract by brute force, on this
// machine's KVM.
func TestTrackers(t *testing.T) { proveTrackers(t, "trackers") }

// TestLabTrackers does the same where nested page tables map the guest.
func TestLabTrackers(t *testing.T) {
	labtest.Need(t)
	proveTrackers(t, "trackers-npt")
}

// proveTrackers follows a machine whose vCPU writes at full speed, while the VMM
// writes, the balloon takes pages, and files are read past the page cache into
// the same large frames, and while signals interrupt every call to the kernel.
func proveTrackers(t *testing.T, id string) {
	checks, pages := 0, uint64(0)
	for _, kind := range kinds {
		for _, huge := range []memory.HugePages{memory.HugePagesTHP, memory.HugePagesOff} {
			for _, order := range []payload.Order{payload.Sequential, payload.Random} {
				t.Run(fmt.Sprintf("%s/%s/%s", kind, huge, order), func(t *testing.T) {
					pages += followGuest(t, kind, huge, order)
					checks++
				})
			}
		}
	}
	labtest.Proof(t, id, "%d comparisons of all bytes after %d pages in rounds of %d, nothing omitted", checks, pages, trackerRounds())
}

// trackerRounds is how often each tracker is collected.
func trackerRounds() int { return labtest.Count(20, 200) }

// followGuest returns how many pages were reported.
func followGuest(t *testing.T, kind memory.TrackerKind, huge memory.HugePages, order payload.Order) (pages uint64) {
	const size = 40 << 20
	m := newMachine(t, memory.Config{Size: size, HugePages: huge}, kind)
	devices := newDevices(t, m, memory.Range{Start: size - reserved, Size: reserved})
	// The working set ends inside a large frame: the VMM's part shares it.
	m.load(payload.MemWriterConfig{WorkingSet: size - guestStart - reserved - 5*page, Order: order, Words: 3, Seed: 7})
	mirror, err := trackertest.NewMirror(m.Memory, m.Tracker)
	if err != nil {
		t.Fatal(err)
	}
	m.Start()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() { devices.work(stop) })
	wg.Go(func() { shake(t, stop) })
	last := uint64(0)
	for n := range trackerRounds() {
		mode := memory.Rearm
		if n%3 == 2 {
			mode = memory.RearmSmall
		}
		set, err := mirror.Round(mode)
		if err != nil {
			t.Error(err)
			break
		}
		pages += set.Count()
		// Each round has writes of the guest in it.
		s := m.await(func(s payload.MemWriterStatus) bool { return s.Writes >= last+500 })
		last = s.Writes
	}
	close(stop)
	wg.Wait()
	m.command(payload.CommandPause, payload.StatePaused)
	if _, err := mirror.Round(memory.Rearm); err != nil {
		t.Fatal(err)
	}
	if err := mirror.Check(); err != nil {
		t.Error(err)
	}
	// What is paused writes nothing but its status page; a CPU with nested paging
	// walks the guest's page tables as if it wrote them (AMD APM 2, 15.25.6).
	const pageTables = 3
	if set, err := mirror.Round(memory.Rearm); kind != memory.TrackerNone && (err != nil || set.Count() > 1+pageTables) {
		t.Errorf("%d pages written while paused, want at most the status page and the page tables (%v)", set.Count(), err)
	}
	m.finish()
	return pages
}
