package memory_test

import (
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

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

// blankSource has pages of one byte.
type blankSource struct{ row uint64 }

func (b blankSource) ReadPages(_ memory.GFN, dst []byte) error {
	dst[0] = 1
	return nil
}

func (b blankSource) Row(gfn memory.GFN) memory.Range {
	first := uint64(gfn) / b.row * b.row
	return memory.Range{Start: memory.GFN(first).GPA(), Size: b.row * page}
}

// BenchmarkMissing measures what a fault of the kernel on a missing page costs,
// alone and with neighbours, what a Go access costs when nothing is missing any
// more, and how fast all is fetched.
func BenchmarkMissing(b *testing.B) {
	const size = 64 << 20
	serve := func(b *testing.B, row uint64, body func(s *memory.Space, m *memory.Missing)) {
		b.StopTimer()
		s := newSpace(b, memory.Config{Size: size})
		m := missing(b, s, blankSource{row}, []memory.Range{{Start: 0, Size: size}}, memory.MissingOptions{TrackWrites: true})
		b.StartTimer()
		body(s, m)
		b.StopTimer()
		if err := m.Close(); err != nil {
			b.Fatal(err)
		}
		b.StartTimer()
	}
	for _, row := range []uint64{1, 32} {
		b.Run(fmt.Sprintf("fault/row=%d", row), func(b *testing.B) {
			f := newSink(b)
			for b.Loop() {
				serve(b, row, func(s *memory.Space, _ *memory.Missing) {
					for gpa := memory.GPA(0); gpa < size; gpa += 64 * page {
						if _, err := unix.Pwrite(int(f.Fd()), memory.Raw(s, memory.Range{Start: gpa, Size: page}), 0); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
			b.ReportMetric(float64(b.Elapsed().Microseconds())/float64(b.N)/(size/(64*page)), "us/fault")
		})
	}
	b.Run("run", func(b *testing.B) {
		for b.Loop() {
			serve(b, 1, func(_ *memory.Space, m *memory.Missing) {
				if err := m.Run(b.Context(), 0); err != nil {
					b.Fatal(err)
				}
			})
		}
		b.SetBytes(size)
	})
	b.Run("view", func(b *testing.B) {
		serve(b, 1, func(s *memory.Space, m *memory.Missing) {
			if err := m.Run(b.Context(), 0); err != nil {
				b.Fatal(err)
			}
			for b.Loop() {
				if _, err := s.View(5*page, 16); err != nil {
					b.Fatal(err)
				}
			}
		})
	})
}
