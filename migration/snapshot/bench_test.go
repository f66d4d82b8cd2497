package snapshot

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/memory"
)

const benchSize = 128 << 20

// benchScene is a memory of unique pages, which compress to about two thirds.
func benchScene(b *testing.B) *scene {
	s := newSceneIn(b, quickDir(b), 1, benchSize)
	all, err := s.space.Writable(0, benchSize)
	if err != nil {
		b.Fatal(err)
	}
	s.fill(all[:4<<20])
	for at := 4 << 20; at < len(all); at += 4 << 20 {
		copy(all[at:], all[:4<<20])
		for page := at; page < at+4<<20; page += memory.PageSize {
			copy(all[page:], fmt.Sprint(page))
		}
	}
	return s
}

// report states the throughput in GiB/s.
func report(b *testing.B) {
	b.SetBytes(benchSize)
	b.ReportMetric(float64(b.N)*benchSize/(1<<30)/b.Elapsed().Seconds(), "GiB/s")
}

// BenchmarkSave is what a save costs of memory without a single name: capture
// is the pause, without any page stored before.
func BenchmarkSave(b *testing.B) {
	for _, c := range []Compression{None, Zstd} {
		b.Run(string(c), func(b *testing.B) {
			s := benchScene(b)
			for b.Loop() {
				s.save("snap", s.options(c), Capture{})
				b.StopTimer()
				os.RemoveAll(filepath.Join(s.dir, "snap"))
				b.StartTimer()
			}
			report(b)
		})
	}
}

// BenchmarkCapture is the pause of a live save in which 1 % of memory was
// written since it was stored.
func BenchmarkCapture(b *testing.B) {
	s := benchScene(b)
	all, dirty := s.space.NewPageSet(), s.space.NewPageSet()
	all.Add(0, benchSize)
	for gpa := memory.GPA(0); gpa < benchSize; gpa += 100 * memory.PageSize {
		dirty.Add(gpa, memory.PageSize)
	}
	m := s.pass(true)
	for b.Loop() {
		b.StopTimer()
		w := s.create("snap", s.options(None))
		if err := w.AddPages(context.Background(), all); err != nil {
			b.Fatal(err)
		}
		for r := range dirty.Runs() {
			s.page(r.Start.GFN())[0]++
		}
		b.StartTimer()
		if err := w.Capture(context.Background(), Capture{Map: m, Dirty: dirty}); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		w.Abort()
		b.StartTimer()
	}
}

// BenchmarkLoad is an eager restore from the page cache.
func BenchmarkLoad(b *testing.B) {
	for _, c := range []Compression{None, Zstd} {
		b.Run(string(c), func(b *testing.B) {
			s := benchScene(b)
			s.save("snap", s.options(c), Capture{})
			snap := s.open("snap")
			space := newSpace(b, benchSize)
			for b.Loop() {
				if err := snap.Load(context.Background(), space, LoadOptions{}); err != nil {
					b.Fatal(err)
				}
				b.StopTimer()
				if err := space.Clear(); err != nil {
					b.Fatal(err)
				}
				b.StartTimer()
			}
			report(b)
		})
	}
}

// BenchmarkOpen is what a lazy restore waits for: 100,000 runs, opened and
// planned.
func BenchmarkOpen(b *testing.B) {
	s := newSceneIn(b, quickDir(b), 2, 1<<30)
	for i := range memory.GFN(50000) {
		copy(s.page(i*2), fmt.Sprint(i))
	}
	s.save("snap", s.options(None), Capture{})
	for b.Loop() {
		snap, err := Open(filepath.Join(s.dir, "snap"), OpenOptions{})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := snap.Plan(context.Background(), PlanOptions{}); err != nil {
			b.Fatal(err)
		}
		snap.Close()
	}
}

// BenchmarkReadPage is what serving one page costs.
func BenchmarkReadPage(b *testing.B) {
	for _, c := range []Compression{None, Zstd} {
		b.Run(string(c), func(b *testing.B) {
			s := newSceneIn(b, quickDir(b), 3, 16<<20)
			all, _ := s.space.Writable(0, 16<<20)
			s.fill(all)
			s.save("snap", s.options(c), Capture{})
			r := s.open("snap").NewReader()
			defer r.Close()
			var page [memory.PageSize]byte
			for gfn := memory.GFN(0); b.Loop(); gfn = (gfn + 1009) % 4096 {
				if err := r.ReadPage(gfn, page[:]); err != nil {
					b.Fatal(err)
				}
			}
			b.SetBytes(memory.PageSize)
		})
	}
}
