package memory_test

import (
	"fmt"
	"math/rand/v2"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

// fakeKVM keeps dirty bitmaps and a dirty ring by KVM's rules and is strict
// about what callers pass.
type fakeKVM struct {
	space *memory.Space
	fail  error // returned by the log calls when set

	mu     sync.Mutex // guards what follows
	manual bool
	slots  map[uint32]*fakeSlot
	ring   []fakeEntry
	full   func() // called by a write that finds no room in the ring
	// cutShort makes every other reset end early, with its last page counted
	// and not protected, as Linux does when a signal is pending.
	cutShort bool
	resets   int
	rings    bool
}

type fakeSlot struct {
	region    memory.Region
	logging   bool
	dirty     map[uint64]bool
	protected map[uint64]bool // with rings: written pages enter the ring once
}

type fakeEntry struct {
	slot      uint32
	page      uint64
	harvested bool
}

func newFakeKVM(s *memory.Space) *fakeKVM {
	k := &fakeKVM{space: s, slots: map[uint32]*fakeSlot{}}
	for _, r := range s.Regions() {
		k.slots[r.Slot] = &fakeSlot{region: r}
	}
	return k
}

func (k *fakeKVM) EnableManualDirtyLog() error { k.manual = true; return k.fail }

func (k *fakeKVM) LogDirtyPages(slot uint32, gpa, size, hva uint64, on bool) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	sl := k.slots[slot]
	if sl == nil || gpa != uint64(sl.region.Start) || size != sl.region.Size || hva != uint64(sl.region.HVA) {
		return unix.EINVAL
	}
	sl.logging, sl.dirty, sl.protected = on, map[uint64]bool{}, map[uint64]bool{}
	for p := range size / page {
		sl.dirty[p] = on && k.manual
		sl.protected[p] = on
	}
	return nil
}

func (k *fakeKVM) DirtyLog(slot uint32, bitmap []uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	sl := k.slots[slot]
	if k.fail != nil || sl == nil || !sl.logging || uint64(len(bitmap)) < (sl.region.Size/page+63)/64 {
		return fmt.Errorf("dirty log of slot %d: %w", slot, unix.EINVAL)
	}
	clear(bitmap)
	for p, dirty := range sl.dirty {
		if dirty {
			bitmap[p/64] |= 1 << (p % 64)
		}
	}
	return nil
}

func (k *fakeKVM) ClearDirtyLog(slot uint32, first uint64, n uint32, bitmap []uint64) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	sl := k.slots[slot]
	pages := sl.region.Size / page
	if first%64 != 0 || first+uint64(n) > pages || n%64 != 0 && first+uint64(n) != pages || n == 0 {
		return fmt.Errorf("clear pages [%d, +%d) of %d: %w", first, n, pages, unix.EINVAL)
	}
	for i := range uint64(n) {
		if bitmap[i/64]&(1<<(i%64)) != 0 {
			sl.dirty[first+i] = false
		}
	}
	return nil
}

func (k *fakeKVM) Harvest(visit func(slot uint32, page uint64)) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for i := range k.ring {
		if !k.ring[i].harvested {
			k.ring[i].harvested = true
			visit(k.ring[i].slot, k.ring[i].page)
			n++
		}
	}
	return n
}

func (k *fakeKVM) ResetDirtyRings() (int, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.fail != nil {
		return 0, k.fail
	}
	var left []fakeEntry
	k.resets++
	cut := k.cutShort && k.resets%2 == 0
	for i, e := range k.ring {
		switch last := cut && i == len(k.ring)/2; {
		case !e.harvested, cut && i > len(k.ring)/2:
			left = append(left, e)
		case !last:
			k.slots[e.slot].protected[e.page] = true
		}
	}
	n := len(k.ring) - len(left)
	k.ring = left
	return n, nil
}

// guestWrite writes a byte as a vCPU does.
func (k *fakeKVM) guestWrite(gpa memory.GPA) {
	for {
		k.mu.Lock()
		if len(k.ring) < 32 {
			break
		}
		k.mu.Unlock()
		k.full()
	}
	defer k.mu.Unlock()
	for _, sl := range k.slots {
		if !sl.region.Contains(gpa, 1) {
			continue
		}
		if p := uint64(gpa-sl.region.Start) / page; sl.logging {
			sl.dirty[p] = true
			if k.rings && sl.protected[p] {
				sl.protected[p] = false
				k.ring = append(k.ring, fakeEntry{slot: sl.region.Slot, page: p})
			}
		}
	}
	mem, err := k.space.Writable(gpa, 1)
	if err != nil {
		panic(err)
	}
	mem[0]++
}

// openFake makes a tracker over a fake KVM.
func openFake(t *testing.T, kind memory.TrackerKind, s *memory.Space) (*fakeKVM, memory.Tracker) {
	t.Helper()
	k := newFakeKVM(s)
	host := memory.TrackerHost{Log: k}
	if kind == memory.TrackerKVMRing {
		k.rings = true
		host = memory.TrackerHost{Ring: k, Rings: []memory.DirtyRing{k}}
	}
	tr, _, err := memory.OpenTracker(s, kind, host)
	if err != nil {
		t.Fatal(err)
	}
	if r, ok := tr.(*memory.KVMRing); ok {
		k.full = func() {
			if err := r.RingFull(); err != nil {
				t.Error(err)
			}
		}
	}
	return k, tr
}

var kvmKinds = []memory.TrackerKind{memory.TrackerKVMLog, memory.TrackerKVMRing}

// TestKVMTrackersFollow: brute force over a fake KVM, across the hole and with a
// region whose pages do not fill a word.
func TestKVMTrackersFollow(t *testing.T) {
	for _, kind := range kvmKinds {
		t.Run(kind.String(), func(t *testing.T) {
			s := newSpace(t, memory.Config{Size: 8*frame + 5*page, HugePages: memory.HugePagesOff})
			k, tr := openFake(t, kind, s)
			m, err := trackertest.NewMirror(s, tr)
			if err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(5, 5))
			anywhere := func() memory.GPA { return memory.GPA(rng.Uint64N(s.Size())) }
			for round := range 50 {
				touched := s.NewPageSet()
				for range rng.IntN(200) {
					gpa := anywhere()
					touched.Add(gpa, 1)
					switch rng.IntN(4) {
					case 0:
						if err := s.WriteAt([]byte{byte(round)}, gpa); err != nil {
							t.Fatal(err)
						}
					case 1:
						if err := s.Discard(gpa&^(page-1), page); err != nil {
							t.Fatal(err)
						}
					default:
						k.guestWrite(gpa)
					}
				}
				peeked := s.NewPageSet()
				if err := tr.Collect(s.Regions()[0].Range, peeked, memory.Peek); err != nil {
					t.Fatal(err)
				}
				got, err := m.Round(memory.Rearm)
				if err != nil {
					t.Fatal(err)
				}
				if got.Count() != touched.Count() || peeked.Count() != touched.Count() {
					t.Fatalf("round %d: %d pages reported, %d peeked, %d written", round, got.Count(), peeked.Count(), touched.Count())
				}
				if err := m.Check(); err != nil {
					t.Fatal(err)
				}
			}
			if err := tr.Close(); err != nil {
				t.Error(err)
			}
			if k.slots[0].logging {
				t.Error("logging is still on after Close")
			}
		})
	}
}

// TestKVMRingCutShort: a reset that ends early costs reports of pages that were
// not written, and hides none that was.
func TestKVMRingCutShort(t *testing.T) {
	s := newSpace(t, memory.Config{Size: 8*frame + 5*page, HugePages: memory.HugePagesOff})
	k, tr := openFake(t, memory.TrackerKVMRing, s)
	m, err := trackertest.NewMirror(s, tr)
	if err != nil {
		t.Fatal(err)
	}
	k.cutShort = true
	rng := rand.New(rand.NewPCG(6, 6))
	cut := 0
	for round := range 100 {
		for range rng.IntN(200) {
			k.guestWrite(memory.GPA(rng.Uint64N(40)) * page)
		}
		got, err := m.Round(memory.Rearm)
		if err != nil {
			t.Fatal(err)
		}
		if got.Count() > 40 {
			cut++
		}
		if err := m.Check(); err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
	}
	if cut == 0 || k.resets < 100 {
		t.Errorf("%d resets, %d rounds with one that was cut short: shows nothing", k.resets, cut)
	}
}

// TestKVMTrackersPartly: what is armed in part, disarmed or remapped counts as
// written where it must, and nowhere else.
func TestKVMTrackersPartly(t *testing.T) {
	const size = 300 * page
	all := memory.Range{Size: size}
	for _, kind := range kvmKinds {
		t.Run(kind.String(), func(t *testing.T) {
			s := newSpace(t, memory.Config{Size: size, HugePages: memory.HugePagesOff})
			k, tr := openFake(t, kind, s)
			collect := func(what string, r memory.Range, want uint64) {
				t.Helper()
				got := s.NewPageSet()
				if err := tr.Collect(r, got, memory.Rearm); err != nil || got.Count() != want {
					t.Errorf("%s: %d pages, want %d (%v)", what, got.Count(), want, err)
				}
			}
			arm := func(r memory.Range) {
				t.Helper()
				if err := tr.Arm(r); err != nil {
					t.Fatal(err)
				}
			}
			arm(memory.Range{Start: 10 * page, Size: 70 * page})
			collect("armed in part", all, 230)
			collect("armed by collecting", all, 0)
			k.guestWrite(70 * page)
			arm(memory.Range{Start: 64 * page, Size: 64 * page})
			collect("forgotten by arming", all, 0)
			k.guestWrite(5 * page)
			k.guestWrite(200 * page)
			collect("only the range", memory.Range{Start: 100 * page, Size: 150 * page}, 1)
			collect("the rest", all, 1)
			if err := tr.Disarm(memory.Range{Start: page, Size: 3 * page}); err != nil {
				t.Fatal(err)
			}
			collect("disarmed in part", all, 3)
			if err := tr.Remapped(memory.Range{Start: page, Size: 2 * page}); err != nil {
				t.Fatal(err)
			}
			collect("remapped", all, 2)
			if err := tr.Disarm(all); err != nil {
				t.Fatal(err)
			}
			if k.slots[0].logging {
				t.Error("logging is on though all is disarmed")
			}
			got := s.NewPageSet()
			if err := tr.Collect(all, got, memory.Peek); err != nil || got.Count() != 300 {
				t.Errorf("peek at unarmed memory: %d pages, want all (%v)", got.Count(), err)
			}
			collect("disarmed", all, 300)
			collect("armed again", all, 0)
		})
	}
}

// TestKVMTrackersFail: when KVM fails, everything counts as written.
func TestKVMTrackersFail(t *testing.T) {
	for _, kind := range kvmKinds {
		t.Run(kind.String(), func(t *testing.T) {
			s := newSpace(t, memory.Config{Size: 300 * page, HugePages: memory.HugePagesOff})
			k, tr := openFake(t, kind, s)
			if err := tr.Arm(memory.Range{Size: 300 * page}); err != nil {
				t.Fatal(err)
			}
			k.guestWrite(0)
			k.fail = unix.EIO
			got := s.NewPageSet()
			if err := tr.Collect(memory.Range{Size: 300 * page}, got, memory.Rearm); err == nil || got.Count() != 300 {
				t.Errorf("%d pages reported, want all, and an error (%v)", got.Count(), err)
			}
			// When KVM works again, so does the tracker.
			k.fail = nil
			got.Clear()
			if err := tr.Collect(memory.Range{Size: 300 * page}, got, memory.Rearm); err != nil {
				t.Fatal(err)
			}
			got.Clear()
			k.guestWrite(0)
			if err := tr.Collect(memory.Range{Size: 300 * page}, got, memory.Rearm); err != nil || !got.Has(0) {
				t.Errorf("a write after the failure was not reported (%v)", err)
			}
		})
	}
}
