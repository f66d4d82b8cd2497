package names

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"

	"ditto.vm/memory"
)

// table returns the table of size bytes of memory with one layer of blocks.
func table(t testing.TB, size uint64, blocks int64) (*Table, *memory.Space, LayerID) {
	t.Helper()
	space, err := memory.New(memory.Config{Size: size})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { space.Close() })
	tab := NewTable(space)
	space.SetObserver(tab)
	l, err := tab.AddLayer(Layer{Title: "disk", Size: blocks * BlockSize})
	if err != nil {
		t.Fatal(err)
	}
	return tab, space, l
}

// pages returns the memory of n pages from a page on.
func pages(page, n uint64) []memory.Range {
	return []memory.Range{{Start: memory.GPA(page << 12), Size: n << 12}}
}

// read does a read of n blocks into pages as a device does.
func read(t *Table, s *memory.Space, l LayerID, block int64, mem []memory.Range) {
	t.BeginRead(l, block*BlockSize, mem)
	for _, m := range mem {
		s.Wrote(m.Start, m.Size)
	}
	t.EndRead(l, block*BlockSize, mem, true)
}

func TestReadNames(t *testing.T) {
	tab, s, l := table(t, 4<<20, 100)
	read(tab, s, l, 10, pages(3, 4))
	for i := range uint64(4) {
		if got := tab.At(memory.GFN(3 + i)); got != OfBlock(l, 10+i) {
			t.Errorf("page %d is %s", 3+i, got)
		}
	}
	if got := tab.At(7); got != 0 {
		t.Errorf("page 7 is %s", got)
	}
	var row [6]Name
	tab.Load(row[:], 2)
	if row != [6]Name{0, OfBlock(l, 10), OfBlock(l, 11), OfBlock(l, 12), OfBlock(l, 13), 0} {
		t.Errorf("row is %v", row)
	}
	want := Stats{Recorded: 4, Named: 4}
	if got := tab.Stats(); got != want {
		t.Errorf("stats %+v, want %+v", got, want)
	}
}

// TestHooks has one case for each thing that can happen to a page or a block
// that is named or in flight. Page 1 was read from block 1 before, and is read
// from or written to block 5 meanwhile.
func TestHooks(t *testing.T) {
	const page, old, block = 1, 1, 5
	for _, tc := range []struct {
		name      string
		meanwhile func(tab *Table, s *memory.Space, l LayerID)
		read      bool // the read is recorded nevertheless
		write     bool // the write is
	}{
		{"nothing", func(*Table, *memory.Space, LayerID) {}, true, true},
		{"other block written", func(tab *Table, _ *memory.Space, l LayerID) {
			tab.BeginWrite(l, 6*BlockSize, pages(9, 1))
			tab.EndWrite(l, 6*BlockSize, pages(9, 1), true)
		}, true, true},
		{"block written", func(tab *Table, _ *memory.Space, l LayerID) {
			tab.BeginWrite(l, block*BlockSize, pages(9, 1))
			tab.EndWrite(l, block*BlockSize, pages(9, 1), true)
		}, false, false},
		{"sector of block written", func(tab *Table, _ *memory.Space, l LayerID) {
			sector := []memory.Range{{Start: 9 << 12, Size: 512}}
			tab.BeginWrite(l, block*BlockSize+512, sector)
			tab.EndWrite(l, block*BlockSize+512, sector, true)
		}, false, false},
		{"block read elsewhere", func(tab *Table, s *memory.Space, l LayerID) {
			read(tab, s, l, block, pages(9, 1))
		}, true, true},
		{"block erased", func(tab *Table, _ *memory.Space, l LayerID) {
			tab.BeginErase(l, 0, 100*BlockSize)
			tab.EndErase(l, 0, 100*BlockSize)
		}, false, false},
		{"block erased after", func(tab *Table, _ *memory.Space, l LayerID) { tab.DropBlocks(l, block*BlockSize, 1) }, false, false},
		{"cut short", func(tab *Table, _ *memory.Space, l LayerID) { tab.DropBeyond(l, block*BlockSize) }, false, false},
		{"cut inside the block", func(tab *Table, _ *memory.Space, l LayerID) { tab.DropBeyond(l, block*BlockSize+512) }, false, false},
		{"cut behind", func(tab *Table, _ *memory.Space, l LayerID) { tab.DropBeyond(l, (block+1)*BlockSize) }, true, true},
		{"page read too", func(tab *Table, s *memory.Space, l LayerID) { read(tab, s, l, 7, pages(page, 1)) }, false, false},
		{"sector of page read too", func(tab *Table, s *memory.Space, l LayerID) {
			sector := []memory.Range{{Start: page<<12 + 512, Size: 512}}
			read(tab, s, l, 7, sector)
		}, false, false},
		{"page written elsewhere", func(tab *Table, _ *memory.Space, l LayerID) {
			tab.BeginWrite(l, 7*BlockSize, pages(page, 1))
			tab.EndWrite(l, 7*BlockSize, pages(page, 1), true)
		}, false, false},
		{"page dropped", func(tab *Table, _ *memory.Space, _ LayerID) { tab.Drop(pages(page, 1)[0]) }, false, false},
		{"page written by the VMM", func(_ *Table, s *memory.Space, _ LayerID) { s.Wrote(page<<12+100, 4) }, false, false},
		{"page discarded", func(_ *Table, s *memory.Space, _ LayerID) { s.Discard(page<<12, 4096) }, false, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			want := func(tab *Table, l LayerID, recorded bool) {
				t.Helper()
				got := tab.At(page)
				if recorded && got != OfBlock(l, block) || !recorded && got == OfBlock(l, block) {
					t.Errorf("page is %s", got)
				}
				for p := range uint32(tab.pages) {
					if w := tab.load(p); w != 0 && w.kind() != kindNamed {
						t.Errorf("page %d stays in flight: %#x", p, uint64(w))
					}
				}
				if err := tab.invariants(); err != nil {
					t.Error(err)
				}
			}
			tab, s, l := table(t, 4<<20, 100)
			read(tab, s, l, old, pages(page, 1))
			tab.BeginRead(l, block*BlockSize, pages(page, 1))
			if got := tab.At(page); got != 0 {
				t.Errorf("page that is being read is %s", got)
			}
			tc.meanwhile(tab, s, l)
			s.Wrote(page<<12, 4096)
			tab.EndRead(l, block*BlockSize, pages(page, 1), true)
			want(tab, l, tc.read)

			tab, s, l = table(t, 4<<20, 100)
			read(tab, s, l, block, pages(8, 1))
			tab.BeginWrite(l, block*BlockSize, pages(page, 1))
			if got := tab.At(8); got != 0 {
				t.Errorf("page of a block that is being written is %s", got)
			}
			tc.meanwhile(tab, s, l)
			tab.EndWrite(l, block*BlockSize, pages(page, 1), true)
			want(tab, l, tc.write)

			// A name that stands meanwhile.
			tab, s, l = table(t, 4<<20, 100)
			read(tab, s, l, block, pages(page, 1))
			tc.meanwhile(tab, s, l)
			want(tab, l, tc.read)
		})
	}
}

func TestNeverRecorded(t *testing.T) {
	for _, tc := range []struct {
		name   string
		offset int64
		mem    []memory.Range
		failed bool
		want   map[memory.GFN]uint64 // blocks by page
	}{
		{name: "failed", mem: pages(1, 2), failed: true},
		{name: "page twice", mem: append(pages(1, 2), pages(1, 1)...), want: map[memory.GFN]uint64{2: 1}},
		{name: "page twice in part", mem: append(pages(1, 2), memory.Range{Start: 1 << 12, Size: 512}), want: map[memory.GFN]uint64{2: 1}},
		{name: "offset on disk", offset: 512, mem: pages(1, 3)},
		{name: "offset in memory", mem: []memory.Range{{Start: 1<<12 + 512, Size: 3 << 12}}},
		{name: "both", offset: 512, mem: []memory.Range{{Start: 1<<12 + 512, Size: 3 << 12}}, want: map[memory.GFN]uint64{2: 1, 3: 2}},
		{name: "halves", mem: []memory.Range{{Start: 1 << 12, Size: 2048}, {Start: 1<<12 + 2048, Size: 2048}}},
		{name: "beyond the end", offset: 99 * BlockSize, mem: pages(1, 2), want: map[memory.GFN]uint64{1: 99}},
		{name: "outside RAM", mem: pages(1023, 2), want: map[memory.GFN]uint64{1023: 0}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			tab, s, l := table(t, 4<<20, 100)
			tab.BeginRead(l, tc.offset, tc.mem)
			for _, m := range tc.mem {
				s.Wrote(m.Start, m.Size)
			}
			tab.EndRead(l, tc.offset, tc.mem, !tc.failed)
			for gfn := range memory.GFN(1024) {
				want := Name(0)
				if b, ok := tc.want[gfn]; ok {
					want = OfBlock(l, b)
				}
				if got := tab.At(gfn); got != want {
					t.Errorf("page %s is %s, want %s", gfn, got, want)
				}
			}
			if err := tab.invariants(); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestRecord(t *testing.T) {
	tab, _, l := table(t, 4<<20, 100)
	for _, tc := range []struct {
		gpa  memory.GPA
		name Name
		want bool
	}{
		{0x1000, OfBlock(l, 99), true},
		{0x1000, OfBlock(l, 98).AsProven(), true},
		{0x2000, OfBlock(l, 100), false},
		{0x2000, OfBlock(l+1, 1), false},
		{0x2000, ZeroPage, false},
		{0x2000, OfPage(1), false},
		{0x2001, OfBlock(l, 1), false},
		{4 << 20, OfBlock(l, 1), false},
	} {
		if got := tab.Record(tc.gpa, tc.name); got != tc.want {
			t.Errorf("record %s as %s: %t", tc.gpa, tc.name, got)
		}
	}
	if got := tab.At(1); got != OfBlock(l, 98) {
		t.Errorf("page 1 is %s", got)
	}
	if got := tab.At(2); got != 0 {
		t.Errorf("page 2 is %s", got)
	}
	if err := tab.invariants(); err != nil {
		t.Error(err)
	}
}

// TestManyPagesOfABlock: a guest cannot make a chain long.
func TestManyPagesOfABlock(t *testing.T) {
	tab, s, l := table(t, 64<<20, 100)
	for p := range uint64(1000) {
		read(tab, s, l, 7, pages(p, 1))
	}
	stats := tab.Stats()
	if stats.Named != longestChain || stats.Missed != 1000-longestChain {
		t.Errorf("%d pages are named by one block, %d missed; the chain holds %d", stats.Named, stats.Missed, longestChain)
	}
	tab.BeginErase(l, 7*BlockSize, BlockSize)
	tab.EndErase(l, 7*BlockSize, BlockSize)
	if stats := tab.Stats(); stats.Named != 0 || stats.DroppedErase != longestChain {
		t.Errorf("after the erasure: %+v", stats)
	}
	if err := tab.invariants(); err != nil {
		t.Error(err)
	}
}

func TestLayers(t *testing.T) {
	tab, _, l := table(t, 4<<20, 100)
	tab.DropBeyond(l, 50*BlockSize+100)
	second, err := tab.AddLayer(Layer{Title: "second", Size: 5000})
	if err != nil {
		t.Fatal(err)
	}
	got := tab.Layers()
	if len(got) != 2 || got[l].Size != 50*BlockSize || got[second].Size != 5000 || got[second].Title != "second" {
		t.Errorf("layers are %+v", got)
	}
	if _, err := tab.AddLayer(Layer{Size: 1 << 62}); err == nil {
		t.Error("a layer of 4 EiB was added")
	}
	for range MaxLayers - 2 {
		if _, err := tab.AddLayer(Layer{}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := tab.AddLayer(Layer{}); err == nil {
		t.Error("more than 4096 layers were added")
	}
}

// TestTwoRegions: pages above the hole have names of their own.
func TestTwoRegions(t *testing.T) {
	tab, s, l := table(t, 3<<30+8<<20, 100)
	high := []memory.Range{{Start: memory.HoleEnd + 0x3000, Size: 4096}}
	low := []memory.Range{{Start: memory.HoleStart - 4096, Size: 4096}}
	read(tab, s, l, 1, high)
	read(tab, s, l, 2, low)
	if got := tab.At(high[0].Start.GFN()); got != OfBlock(l, 1) {
		t.Errorf("page above the hole is %s", got)
	}
	if got := tab.At(low[0].Start.GFN()); got != OfBlock(l, 2) {
		t.Errorf("page below the hole is %s", got)
	}
	if got := tab.At(memory.HoleStart.GFN()); got != 0 {
		t.Errorf("the hole is %s", got)
	}
	var runs []memory.Range
	if err := tab.provisional(memory.Range{Start: 0, Size: 5 << 30}, func(r memory.Range) error {
		runs = append(runs, r)
		return nil
	}); err != nil {
		t.Fatal(err)
	}
	if len(runs) != 2 || runs[0] != low[0] || runs[1] != high[0] {
		t.Errorf("runs are %v", runs)
	}
	s.Wrote(0, 5<<30)
	if n := tab.Stats().Named; n != 0 {
		t.Errorf("%d names are left", n)
	}
}

// TestConcurrent lets many workers meet on few pages and blocks. The hooks must
// not lose count of anything.
func TestConcurrent(t *testing.T) {
	tab, s, l := table(t, 4<<20, 64)
	var recorded atomic.Int64
	var wg sync.WaitGroup
	for worker := range uint64(6) {
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(worker, 2))
			for range 20000 {
				mem := pages(rng.Uint64N(32), 1+rng.Uint64N(3))
				offset := rng.Int64N(60) * BlockSize
				switch rng.IntN(8) {
				case 0, 1, 2:
					tab.BeginRead(l, offset, mem)
					s.Wrote(mem[0].Start, mem[0].Size)
					tab.EndRead(l, offset, mem, true)
				case 3, 4:
					tab.BeginWrite(l, offset, mem)
					tab.EndWrite(l, offset, mem, rng.IntN(4) > 0)
				case 5:
					tab.BeginErase(l, offset, 4*BlockSize)
					tab.EndErase(l, offset, 4*BlockSize)
				case 6:
					s.Wrote(mem[0].Start, 1)
				case 7:
					if tab.Record(mem[0].Start, OfBlock(l, rng.Uint64N(64))) {
						recorded.Add(1)
					}
				}
			}
		})
	}
	wg.Wait()
	for page := range uint32(tab.pages) {
		if w := tab.load(page); w != 0 && w.kind() != kindNamed {
			t.Errorf("page %d stays in flight: %#x", page, uint64(w))
		}
	}
	if err := tab.invariants(); err != nil {
		t.Error(err)
	}
	if s := tab.Stats(); s.Recorded == 0 || s.Missed == 0 || recorded.Load() == 0 {
		t.Errorf("nothing met: %+v", s)
	}
}

func TestHooksAllocateNothing(t *testing.T) {
	tab, s, l := table(t, 16<<20, 4096)
	mem := pages(100, 64)
	n := testing.AllocsPerRun(100, func() {
		read(tab, s, l, 0, mem)
		tab.BeginWrite(l, 1<<20, mem)
		tab.EndWrite(l, 1<<20, mem, true)
		tab.BeginErase(l, 1<<20, 1<<20)
		tab.EndErase(l, 1<<20, 1<<20)
	})
	if n != 0 {
		t.Errorf("%v allocations a round", n)
	}
}
