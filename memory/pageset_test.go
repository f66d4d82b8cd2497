package memory

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
)

var setRanges = []Range{{0, 200 * PageSize}, {HoleEnd, 70 * PageSize}}

func TestPageSetRuns(t *testing.T) {
	const p = PageSize
	for _, tt := range []struct {
		add  []Range
		want []Range
	}{
		{nil, nil},
		{[]Range{{5 * p, 1}}, []Range{{5 * p, p}}},
		{[]Range{{5*p + 4095, 2}}, []Range{{5 * p, 2 * p}}},
		{[]Range{{63 * p, 2 * p}}, []Range{{63 * p, 2 * p}}},
		{[]Range{{0, 200 * p}}, []Range{{0, 200 * p}}},
		{[]Range{{199 * p, p}, {HoleEnd, p}}, []Range{{199 * p, p}, {HoleEnd, p}}},
		{[]Range{{64 * p, 64 * p}, {0, p}}, []Range{{0, p}, {64 * p, 64 * p}}},
		{[]Range{{0, ^uint64(0)}}, []Range{{0, 200 * p}, {HoleEnd, 70 * p}}},
		{[]Range{{HoleEnd + 69*p, ^uint64(0)}}, []Range{{HoleEnd + 69*p, p}}},
		{[]Range{{HoleStart, 1 << 29}, {3 * p, 0}}, nil},
	} {
		s := NewPageSet(setRanges)
		for _, r := range tt.add {
			s.Add(r.Start, r.Size)
		}
		got := slices.Collect(s.Runs())
		if fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("runs of %v: %v, want %v", tt.add, got, tt.want)
		}
		for range s.Runs() {
			break // a consumer may stop at any time
		}
	}
}

// TestPageSetModel compares random operations with a map.
func TestPageSetModel(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	s, into := NewPageSet(setRanges), NewPageSet(setRanges)
	model, moved := map[GPA]bool{}, map[GPA]bool{}
	pages := func(f func(GPA)) {
		for _, r := range setRanges {
			for gpa := r.Start; gpa < r.End(); gpa += PageSize {
				f(gpa)
			}
		}
	}
	for step := range 5000 {
		r := setRanges[rng.IntN(2)]
		start := r.Start + GPA(rng.Uint64N(r.Size/PageSize))*PageSize
		n := (1 + rng.Uint64N(uint64(r.End()-start)/PageSize)) * PageSize
		op := rng.IntN(4)
		switch op {
		case 0:
			s.Add(start, n)
		case 1:
			s.Remove(start, n)
		case 2:
			s.copyTo(into, start, n)
		case 3:
			s.moveTo(into, start, n)
		}
		for gpa := start; gpa < start+GPA(n); gpa += PageSize {
			switch op {
			case 0:
				model[gpa] = true
			case 1:
				delete(model, gpa)
			case 2, 3:
				if model[gpa] {
					moved[gpa] = true
				}
				if op == 3 {
					delete(model, gpa)
				}
			}
		}
		if s.Count() != uint64(len(model)) || into.Count() != uint64(len(moved)) {
			t.Fatalf("step %d: %d and %d pages, want %d and %d", step, s.Count(), into.Count(), len(model), len(moved))
		}
	}
	pages(func(gpa GPA) {
		if s.Has(gpa) != model[gpa] || s.CountIn(gpa, 1) != uint64(map[bool]int{true: 1}[model[gpa]]) {
			t.Errorf("page %s: in the set %v, want %v", gpa, s.Has(gpa), model[gpa])
		}
	})
	if s.Clear(); s.Count() != 0 {
		t.Error("a cleared set is not empty")
	}
}

// TestPageSetConcurrent: no page added while others are moved away is lost.
func TestPageSetConcurrent(t *testing.T) {
	s, into := NewPageSet(setRanges), NewPageSet(setRanges)
	var wg sync.WaitGroup
	for k := range GPA(4) {
		wg.Go(func() {
			for gpa := k * PageSize; gpa < GPA(setRanges[0].Size); gpa += 4 * PageSize {
				s.Add(gpa, 1)
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for running := true; running; {
		select {
		case <-done:
			running = false
		default:
		}
		s.moveTo(into, 0, setRanges[0].Size)
	}
	if into.Count() != 200 || s.Count() != 0 {
		t.Errorf("%d pages arrived and %d stayed, want 200 and 0", into.Count(), s.Count())
	}
}

func TestPageSetAddAllocates(t *testing.T) {
	s := NewPageSet(setRanges)
	if n := testing.AllocsPerRun(100, func() { s.Add(0, 10*PageSize); s.Clear() }); n != 0 {
		t.Errorf("%v allocations an Add, want 0", n)
	}
}

func BenchmarkPageSetAdd(b *testing.B) {
	s := NewPageSet([]Range{{0, 1 << 30}})
	var gpa GPA
	for b.Loop() {
		s.Add(gpa, PageSize)
		gpa = (gpa + 7*PageSize) & (1<<30 - 1)
	}
}
