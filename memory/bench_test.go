package memory_test

import (
	"errors"
	"testing"

	"ditto.vm/memory"
)

// benchSpace makes a populated Space and its tracker.
func benchSpace(b *testing.B, size uint64, huge memory.HugePages) (*memory.Space, memory.Tracker, []byte) {
	b.Helper()
	needTHP(b)
	s := newSpace(b, memory.Config{Size: size, HugePages: huge})
	tr := open(b, s, memory.TrackerWPAsync)
	fill(b, s)
	mem, err := s.Writable(0, size)
	if err != nil {
		b.Fatal(err)
	}
	return s, tr, mem
}

// mustCollapse collapses a frame, however long it is busy.
func mustCollapse(b *testing.B, f *memory.Frames, gpa memory.GPA) {
	b.Helper()
	err := memory.ErrFrameBusy
	for errors.Is(err, memory.ErrFrameBusy) {
		err = f.Collapse(gpa, 0)
	}
	if err != nil {
		b.Fatal(err)
	}
}

// BenchmarkScan: wp-async looks at 1 GiB that nobody wrote. Bytes are those of
// guest memory.
func BenchmarkScan(b *testing.B) {
	const size = 1 << 30
	for _, huge := range []memory.HugePages{memory.HugePagesTHP, memory.HugePagesOff} {
		b.Run(huge.String(), func(b *testing.B) {
			s, tr, _ := benchSpace(b, size, huge)
			all, set := s.Regions()[0].Range, s.NewPageSet()
			if err := tr.Arm(all); err != nil {
				b.Fatal(err)
			}
			b.SetBytes(size)
			for b.Loop() {
				if err := tr.Collect(all, set, memory.Rearm); err != nil {
					b.Fatal(err)
				}
			}
			if set.Count() != 0 {
				b.Errorf("%d pages written", set.Count())
			}
		})
	}
}

// BenchmarkArm arms 1 GiB anew after disarming it.
func BenchmarkArm(b *testing.B) {
	const size = 1 << 30
	for _, huge := range []memory.HugePages{memory.HugePagesTHP, memory.HugePagesOff} {
		b.Run(huge.String(), func(b *testing.B) {
			s, tr, _ := benchSpace(b, size, huge)
			all := s.Regions()[0].Range
			b.SetBytes(size)
			for b.Loop() {
				if err := tr.Arm(all); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := tr.Disarm(all); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
		})
	}
}

// BenchmarkArmedWrite is the first write to an armed page, by the VMM: a whole
// large frame, which it breaks, and a small page.
func BenchmarkArmedWrite(b *testing.B) {
	const size = 256 << 20
	for _, bench := range []struct {
		name string
		huge memory.HugePages
		step int
	}{{"large frame", memory.HugePagesTHP, frame}, {"small page", memory.HugePagesOff, page}} {
		b.Run(bench.name, func(b *testing.B) {
			s, tr, mem := benchSpace(b, size, bench.huge)
			frames := newFrames(b, s, tr)
			all := s.Regions()[0].Range
			at := size
			for b.Loop() {
				if at >= size {
					b.StopTimer()
					for gpa := memory.GPA(0); bench.step == frame && gpa < size; gpa += frame {
						mustCollapse(b, frames, gpa)
					}
					if err := tr.Arm(all); err != nil {
						b.Fatal(err)
					}
					at = 0
					b.StartTimer()
				}
				mem[at]++
				at += bench.step
			}
		})
	}
}

// BenchmarkBreakCollapse breaks one frame and makes it large again.
func BenchmarkBreakCollapse(b *testing.B) {
	s, tr, _ := benchSpace(b, 64*frame, memory.HugePagesTHP)
	f := newFrames(b, s, tr)
	one := memory.Range{Size: frame}
	b.Run("break", func(b *testing.B) {
		for b.Loop() {
			if err := f.Break(0, memory.ReasonShared); err != nil {
				b.Fatal(err)
			}
			b.StopTimer()
			f.Settle(one, memory.ReasonShared)
			mustCollapse(b, f, 0)
			b.StartTimer()
		}
	})
	b.Run("collapse", func(b *testing.B) {
		for b.Loop() {
			b.StopTimer()
			if err := f.Break(0, memory.ReasonShared); err != nil {
				b.Fatal(err)
			}
			f.Settle(one, memory.ReasonShared)
			b.StartTimer()
			mustCollapse(b, f, 0)
		}
	})
}

// BenchmarkRefresh reads how the host maps 1 GiB.
func BenchmarkRefresh(b *testing.B) {
	const size = 1 << 30
	s, tr, _ := benchSpace(b, size, memory.HugePagesTHP)
	f := newFrames(b, s, tr)
	b.SetBytes(size)
	for b.Loop() {
		if err := f.Refresh(s.Regions()[0].Range); err != nil {
			b.Fatal(err)
		}
	}
}
