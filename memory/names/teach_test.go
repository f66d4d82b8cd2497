package names_test

import (
	"math/rand/v2"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// TestTeach: what a pass finds by an index is in the table afterwards, as a hint;
// what the table knew stays as it was.
func TestTeach(t *testing.T) {
	s := newSpace(t, 4<<20)
	rng := rand.New(rand.NewPCG(11, 11))
	content := random(rng, 16*page)
	table := names.NewTable(s)
	t.Cleanup(func() {
		if err := table.Close(); err != nil {
			t.Error(err)
		}
	})
	l, err := table.AddLayer(layerOf("base", content, true, indexOf(content)))
	if err != nil {
		t.Fatal(err)
	}
	for i := range 4 {
		put(t, s, memory.GFN(i), content[(i+3)*page:][:page])
	}
	put(t, s, 4, random(rng, page)) // unique
	put(t, s, 6, content[:page])
	if !table.Record(memory.GFN(6).GPA(), names.OfBlock(l, 9)) { // a wrong hint
		t.Fatal("not recorded")
	}
	all := mustRun(t, names.Pass{Space: s, Table: table, Layers: table.Layers()})
	if taught := all.Teach(table); taught != 4 {
		t.Errorf("%d pages were taught, want 4", taught)
	}
	for gfn, want := range map[memory.GFN]names.Name{
		0: names.OfBlock(l, 3), 1: names.OfBlock(l, 4), 2: names.OfBlock(l, 5), 3: names.OfBlock(l, 6),
		4: 0, 5: 0, 6: names.OfBlock(l, 9),
	} {
		if got := table.At(gfn); got != want {
			t.Errorf("page %d is %s, want %s", gfn, got, want)
		}
	}
}
