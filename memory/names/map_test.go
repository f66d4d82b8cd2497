package names_test

import (
	"math/rand/v2"
	"reflect"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// next is the name that goes on with a run after n pages.
func next(run names.Run, n uint64) names.Name {
	if k := run.Name.Kind(); k == names.Block || k == names.Page {
		return run.Name + names.Name(n)
	}
	return run.Name
}

// checkRuns: runs say what the map says, cover memory once, and are maximal.
func checkRuns(t *testing.T, s *memory.Space, m *names.Map) {
	t.Helper()
	var all []memory.GFN
	for gfn := range gfns(s) {
		all = append(all, gfn)
	}
	i := 0
	var last names.Run
	for run := range m.Runs() {
		if i < len(all) && last.Pages > 0 && run.Start == last.Start+memory.GFN(last.Pages) && run.Name == next(last, last.Pages) {
			t.Fatalf("run %v could have gone on as %v", last, run)
		}
		for n := range run.Pages {
			if gfn := run.Start + memory.GFN(n); i >= len(all) || all[i] != gfn || m.At(gfn) != next(run, n) {
				t.Fatalf("run %v: page %s is %s", run, gfn, m.At(gfn))
			}
			i++
		}
		last = run
	}
	if i != len(all) {
		t.Errorf("runs cover %d pages of %d", i, len(all))
	}
}

// checkSummary counts page by page.
func checkSummary(t *testing.T, s *memory.Space, m *names.Map) {
	t.Helper()
	want := names.Summary{Layers: make([]uint64, len(m.Layers()))}
	for gfn := range gfns(s) {
		want.Bytes += page
		n := m.At(gfn)
		switch {
		case !m.Populated(gfn):
			want.Absent += page
		case n.Kind() == names.Zero:
			want.Zero += page
		case n.Kind() == names.Block:
			want.Layers[n.Layer()] += page
		case n.Kind() == names.Page:
			want.Duplicate += page
		default:
			want.Unique += page
		}
	}
	if got := m.Summary(); !reflect.DeepEqual(got, want) {
		t.Errorf("summary %+v, want %+v", got, want)
	}
	sum := names.Summary{Layers: make([]uint64, len(m.Layers()))}
	at := m.Regions()[0].Start
	for f := range m.Frames() {
		if f.Start != at && f.Start != memory.HoleEnd || f.Size > memory.LargeFrameSize || f.Bytes != f.Size {
			t.Fatalf("frame %v with %d bytes after %s", f.Range, f.Bytes, at)
		}
		at = f.End()
		if got := m.Count(f.Range); !reflect.DeepEqual(got, f.Summary) {
			t.Fatalf("frame at %s: count %+v, frame %+v", f.Start, got, f.Summary)
		}
		sum = plus(sum, f.Summary)
	}
	if !reflect.DeepEqual(sum, want) {
		t.Errorf("frames add up to %+v, want %+v", sum, want)
	}
}

func plus(a, b names.Summary) names.Summary {
	for i := range b.Layers {
		a.Layers[i] += b.Layers[i]
	}
	return names.Summary{
		Bytes: a.Bytes + b.Bytes, Absent: a.Absent + b.Absent, Zero: a.Zero + b.Zero, Layers: a.Layers, Parent: a.Parent + b.Parent,
		Duplicate: a.Duplicate + b.Duplicate, Unique: a.Unique + b.Unique, Unknown: a.Unknown + b.Unknown,
	}
}

func TestMapOutside(t *testing.T) {
	s := newSpace(t, 3<<30+2<<20)
	put(t, s, memory.HoleEnd.GFN(), []byte{1})
	m := mustRun(t, names.Pass{Space: s})
	for _, gfn := range []memory.GFN{memory.HoleStart.GFN(), memory.HoleEnd.GFN() - 1, memory.HoleEnd.GFN() + 512, 1 << 51} {
		if m.At(gfn) != 0 || m.Populated(gfn) {
			t.Errorf("page %s outside RAM: %s", gfn, m.At(gfn))
		}
	}
	if got := m.Count(memory.Range{Start: memory.HoleStart - page, Size: uint64(memory.HoleEnd-memory.HoleStart) + 2*page}); got.Bytes != 2*page || got.Unique != page {
		t.Errorf("across the hole: %+v", got)
	}
	if got := m.Count(memory.Range{Start: memory.HoleStart, Size: 1 << 30}); got.Bytes != 0 {
		t.Errorf("in the hole: %+v", got)
	}
}

// TestSketch: what a table alone tells, as a map and as a summary.
func TestSketch(t *testing.T) {
	c := newScene(t, rand.New(rand.NewPCG(1, 2)), 4<<30+page, 5000)
	gone := names.OfBlock(names.LayerID(len(c.layers)), 0)
	c.table[0] = gone
	m, err := names.Sketch(c.space, c.table, c.layers)
	if err != nil {
		t.Fatal(err)
	}
	if m.Exact() {
		t.Error("exact")
	}
	for gfn := range gfns(c.space) {
		want := names.Name(0)
		switch hint := c.table[gfn]; {
		case !c.touched[gfn]:
			want = names.ZeroPage
		case int(hint.Layer()) < len(c.layers) && hint.Number() < 300:
			want = names.OfBlock(hint.Layer(), hint.Number())
			if hint == 0 {
				want = 0
			}
		}
		if got := m.At(gfn); got != want || m.Populated(gfn) != c.touched[gfn] {
			t.Fatalf("page %s is %s, want %s", gfn, got, want)
		}
	}
	glance, err := names.Glance(c.space, c.table, c.layers)
	if err != nil {
		t.Fatal(err)
	}
	if sum := m.Summary(); !reflect.DeepEqual(sum, glance) || sum.Unique != 0 || sum.Unknown == 0 {
		t.Errorf("glance %+v, sketch %+v", glance, sum)
	}
}

func TestStepsString(t *testing.T) {
	for s, want := range map[names.Steps]string{
		0: "none", names.StepProven | names.StepDuplicates: "proven+duplicates",
		names.AllSteps: "proven+zero+recorded+index+duplicates",
	} {
		if got := s.String(); got != want {
			t.Errorf("%q, want %q", got, want)
		}
	}
}
