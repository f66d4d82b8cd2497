package names_test

import (
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// TestPass: random memories of many sizes, compared page by page.
func TestPass(t *testing.T) {
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 1))
		size := uint64(2<<20 + rng.IntN(20<<20/page)*page)
		c := newScene(t, rng, size, int(size/page))
		if seed%3 == 0 {
			c.layers, c.bytes = c.layers[:1], c.bytes[:1]
		}
		p := c.pass()
		p.Workers = int(seed % 4)
		p.Running = seed%5 == 0
		m := mustRun(t, p)
		if m.Exact() == p.Running {
			t.Errorf("exact is %v of a running VM %v", m.Exact(), p.Running)
		}
		c.check(t, m)
		checkRuns(t, c.space, m)
		checkSummary(t, c.space, m)
	}
}

// TestPassTwoRegions: memory on both sides of the hole, mostly untouched, and
// equal pages across it.
func TestPassTwoRegions(t *testing.T) {
	c := newScene(t, rand.New(rand.NewPCG(7, 7)), 4<<30+3*page, 3000)
	before, err := c.space.HostUsage()
	if err != nil {
		t.Fatal(err)
	}
	m := mustRun(t, c.pass())
	c.check(t, m)
	checkRuns(t, c.space, m)
	checkSummary(t, c.space, m)
	across := false
	for gfn := memory.HoleEnd.GFN(); gfn < memory.HoleEnd.GFN()+3000; gfn++ {
		n := m.At(gfn)
		across = across || n.Kind() == names.Page && memory.GFN(n.Number()) < memory.HoleStart.GFN()
	}
	if !across {
		t.Error("no page above the hole is equal to one below")
	}
	after, err := c.space.HostUsage()
	if err != nil || after.RSS != before.RSS {
		t.Errorf("the pass changed resident memory from %d to %d bytes (%v)", before.RSS, after.RSS, err)
	}
}

// TestPassProven: what is proven is taken without a look at memory, at a block
// or at an index.
func TestPassProven(t *testing.T) {
	s := newSpace(t, 20<<20)
	table := book{}
	for gfn := range gfns(s) {
		table[gfn] = names.OfBlock(0, uint64(gfn)).AsProven()
	}
	delete(table, 5000) // in the last frame
	before, err := s.HostUsage()
	if err != nil {
		t.Fatal(err)
	}
	m := mustRun(t, names.Pass{Space: s, Table: table, Layers: []names.Layer{{Size: 20 << 20, Immutable: true}}})
	const lastFrame = 18 << 20 / page
	for gfn := range gfns(s) {
		want, populated := table[gfn], gfn < lastFrame
		if !populated {
			want = names.ZeroPage.AsProven() // nothing is there
		}
		if m.At(gfn) != want || m.Populated(gfn) != populated {
			t.Fatalf("page %s is %s, populated %v, want %s", gfn, m.At(gfn), m.Populated(gfn), want)
		}
	}
	if after, err := s.HostUsage(); err != nil || after.RSS != before.RSS {
		t.Errorf("the pass changed resident memory from %d to %d bytes (%v)", before.RSS, after.RSS, err)
	}
	if st := m.Stats(); st.Hashed+st.Digested+st.Read+st.Compared != 0 || st.Steps[0].Named != 18<<20 {
		t.Errorf("%+v", st)
	}
}

// TestPassWorkers: the map does not depend on who did the work.
func TestPassWorkers(t *testing.T) {
	c := newScene(t, rand.New(rand.NewPCG(8, 8)), 40<<20, 40<<20/page)
	p := c.pass()
	p.Workers = 1
	one := mustRun(t, p)
	p.Workers = 4
	four := mustRun(t, p)
	for gfn := range gfns(c.space) {
		if one.At(gfn) != four.At(gfn) {
			t.Fatalf("page %s is %s with one worker and %s with four", gfn, one.At(gfn), four.At(gfn))
		}
	}
	if one.Stats().Workers != 1 || four.Stats().Workers != 3 {
		t.Errorf("%d and %d workers, want 1 and one for each 16 MiB", one.Stats().Workers, four.Stats().Workers)
	}
}

// TestPassSteps: a page goes to the first step that is taken and names it.
func TestPassSteps(t *testing.T) {
	s := newSpace(t, 4<<20)
	rng := rand.New(rand.NewPCG(9, 9))
	content := random(rng, 8*page)
	layers := []names.Layer{
		layerOf("immutable", content, true, indexOf(content)),
		layerOf("written", content, false, nil),
	}
	table := book{
		1: names.OfBlock(0, 1).AsProven(),
		2: names.OfBlock(1, 2),
		3: names.OfBlock(0, 3),
		7: names.ZeroPage.AsProven(),
		8: names.OfPage(5).AsProven(),
		9: names.OfBlock(0, 8).AsProven(), // outside
	}
	for gfn := memory.GFN(1); gfn <= 4; gfn++ {
		put(t, s, gfn, content[gfn*page:][:page])
	}
	double := random(rng, page)
	put(t, s, 5, double)
	put(t, s, 6, double)
	put(t, s, 7, make([]byte, page))
	put(t, s, 8, random(rng, page))
	put(t, s, 9, random(rng, page))

	none := names.Name(0)
	block := func(l names.LayerID, n uint64) names.Name { return names.OfBlock(l, n).AsProven() }
	zero, five := names.ZeroPage.AsProven(), names.OfPage(5).AsProven()
	for _, tt := range []struct {
		steps names.Steps
		want  [10]names.Name
		whole bool
	}{
		{0, [10]names.Name{zero, block(0, 1), block(1, 2), block(0, 3), block(0, 4), none, five, zero, none, none}, true},
		{names.StepProven, [10]names.Name{zero, block(0, 1), none, none, none, none, none, zero, none, none}, false},
		{names.StepZero, [10]names.Name{zero, none, none, none, none, none, none, zero, none, none}, false},
		{names.StepRecorded, [10]names.Name{zero, block(0, 1), block(1, 2), block(0, 3), none, none, none, none, none, none}, false},
		{names.StepIndex, [10]names.Name{zero, block(0, 1), block(0, 2), block(0, 3), block(0, 4), none, none, none, none, none}, false},
		{names.StepDuplicates, [10]names.Name{zero, none, none, none, none, none, five, none, none, none}, false},
	} {
		m := mustRun(t, names.Pass{Space: s, Table: table, Layers: layers, Steps: tt.steps})
		for i, want := range tt.want {
			if got := m.At(memory.GFN(i)); got != want {
				t.Errorf("steps %s: page %d is %s, want %s", tt.steps, i, got, want)
			}
		}
		sum := m.Summary()
		if tt.whole != (sum.Unique > 0) || tt.whole == (sum.Unknown > 0) {
			t.Errorf("steps %s: %d bytes unique, %d unknown", tt.steps, sum.Unique, sum.Unknown)
		}
		named := uint64(0)
		for _, step := range m.Stats().Steps {
			named += step.Named
		}
		if want := sum.Bytes - sum.Absent - sum.Unique - sum.Unknown; named != want {
			t.Errorf("steps %s: %d bytes named by steps, %d in the map", tt.steps, named, want)
		}
	}
}

func TestPassCancelled(t *testing.T) {
	c := newScene(t, rand.New(rand.NewPCG(13, 13)), 64<<20, 64<<20/page)
	why := errors.New("the user said so")
	for _, at := range []uint64{0, 1, 32 << 20, 64 << 20} {
		ctx, cancel := context.WithCancelCause(t.Context())
		if at == 0 {
			cancel(why)
		}
		var last uint64
		p := c.pass()
		p.Workers = 2
		p.Progress = func(done, total uint64) {
			if total != 64<<20 || done <= last {
				t.Errorf("progress %d of %d after %d", done, total, last)
			}
			last = done
			if done >= at {
				cancel(why)
			}
		}
		m, err := p.Run(ctx)
		if m != nil || !errors.Is(err, why) {
			t.Errorf("cancelled at %d bytes: %v, %v", at, m, err)
		}
		if at == 0 && last != 0 {
			t.Errorf("%d bytes done by a pass that was cancelled before", last)
		}
		cancel(nil)
	}
}

// TestPassRunning: a guest that writes all the while.
func TestPassRunning(t *testing.T) {
	c := newScene(t, rand.New(rand.NewPCG(14, 14)), 16<<20, 16<<20/page)
	stop := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		rng := rand.New(rand.NewPCG(15, 15))
		mem, err := c.space.Writable(0, 16<<20)
		for err == nil {
			select {
			case <-stop:
				return
			default:
				copy(mem[rng.IntN(16<<20/page)*page:], mem[rng.IntN(16<<20/page)*page:][:page])
			}
		}
	}()
	p := c.pass()
	p.Running = true
	for range 5 {
		m := mustRun(t, p)
		if m.Exact() {
			t.Error("exact")
		}
		for gfn := range gfns(c.space) {
			if m.At(gfn).Proven() {
				t.Fatalf("page %s is proven %s", gfn, m.At(gfn))
			}
		}
		checkRuns(t, c.space, m)
	}
	close(stop)
	<-stopped
}
