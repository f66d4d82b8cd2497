package names

import (
	"testing"

	"ditto.vm/memory"
)

// BenchmarkRead is what the hooks around a read cost, by its size: ns for each
// page is what to look at. Pages and blocks walk through memory and disk, and
// pages have names from the round before.
func BenchmarkRead(b *testing.B)  { benchmarkIO(b, false) }
func BenchmarkWrite(b *testing.B) { benchmarkIO(b, true) }

func benchmarkIO(b *testing.B, write bool) {
	for _, tc := range []struct {
		name  string
		pages uint64
	}{{"4K", 1}, {"64K", 16}, {"1M", 256}} {
		b.Run(tc.name, func(b *testing.B) {
			const size = 1 << 30
			tab, s, l := table(b, size, 8<<30/BlockSize)
			at, offset := uint64(0), int64(0)
			b.ReportAllocs()
			for b.Loop() {
				// Strides that are prime to the sizes: nothing is neighbouring but
				// the pages of one request.
				at = (at + 9973*tc.pages) % (size/4096 - tc.pages)
				offset = (offset + 15485863*4096) % (8<<30 - int64(tc.pages)*4096) &^ 4095
				mem := [1]memory.Range{{Start: memory.GPA(at << 12), Size: tc.pages << 12}}
				if write {
					tab.BeginWrite(l, offset, mem[:])
					tab.EndWrite(l, offset, mem[:], true)
					continue
				}
				tab.BeginRead(l, offset, mem[:])
				s.Wrote(mem[0].Start, mem[0].Size)
				tab.EndRead(l, offset, mem[:], true)
			}
			b.ReportMetric(float64(b.Elapsed().Nanoseconds())/float64(b.N)/float64(tc.pages), "ns/page")
		})
	}
}

// BenchmarkHostWrite is what the VMM's own writes cost more than without names.
func BenchmarkHostWrite(b *testing.B) {
	tab, _, _ := table(b, 1<<30, 1)
	for b.Loop() {
		tab.HostWrite(0x123456, 64)
	}
}

// BenchmarkErase is what a discard of 1 GiB costs, with 1 GiB of memory named.
func BenchmarkErase(b *testing.B) {
	const size = 1 << 30
	tab, s, l := table(b, size, 2*size/BlockSize)
	for b.Loop() {
		b.StopTimer()
		read(tab, s, l, 0, pages(0, size/4096))
		b.StartTimer()
		tab.BeginErase(l, 0, size)
		tab.EndErase(l, 0, size)
	}
}

// BenchmarkProve is how fast names are proven, arming included, when neither
// policy nor disk hold it back.
func BenchmarkProve(b *testing.B) {
	s := newStage(b, memory.TrackerWPAsync, 0)
	s.fill(stageFrames)
	s.read(0, 0, 2048)
	b.SetBytes(8 << 20)
	for b.Loop() {
		b.StopTimer()
		s.table.demote(memory.Range{Start: 0, Size: 8 << 20})
		b.StartTimer()
		s.steps(1)
	}
	if n := s.table.Stats().NamedProven; n != 2048 {
		b.Errorf("%d pages are proven", n)
	}
}

// BenchmarkStepIdle is a step of the prover with a window of 1 GiB of which all
// is proven: what a guest that does nothing costs the host each time.
func BenchmarkStepIdle(b *testing.B) {
	s := newStageOf(b, memory.TrackerWPAsync, 0, 512)
	s.fill(512)
	for block := uint64(0); block < 512*512; block += 2048 {
		s.read(block, 0, 2048)
	}
	s.steps(3)
	for b.Loop() {
		s.steps(1)
	}
	b.ReportMetric(float64(s.table.Stats().NamedProven), "proven")
}
