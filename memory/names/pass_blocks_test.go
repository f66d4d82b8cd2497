package names_test

import (
	"bytes"
	"errors"
	"io"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// TestPassPrefersRuns: of equal blocks the one after the page before's is taken,
// else one of an immutable layer.
func TestPassPrefersRuns(t *testing.T) {
	s := newSpace(t, 4<<20)
	rng := rand.New(rand.NewPCG(10, 10))
	content := random(rng, 16*page)
	copy(content[8*page:], content[2*page:5*page]) // 8, 9, 10 equal 2, 3, 4
	layers := []names.Layer{
		layerOf("written", content, false, indexOf(content)),
		layerOf("immutable", content, true, indexOf(content)),
	}
	for i, block := range []int{7, 8, 9, 10, 11, 2, 3, 1, 2} {
		put(t, s, memory.GFN(i), content[block*page:][:page])
	}
	m := mustRun(t, names.Pass{Space: s, Layers: layers})
	for i, want := range []uint64{7, 8, 9, 10, 11, 2, 3, 1, 2} {
		if got := m.At(memory.GFN(i)); got != names.OfBlock(1, want).AsProven() {
			t.Errorf("page %d is %s, want block(1, %d)", i, got, want)
		}
	}
	// A row that began with the written layer goes on with it.
	m = mustRun(t, names.Pass{Space: s, Layers: layers, Table: book{0: names.OfBlock(0, 7)}})
	for i, want := range []uint64{7, 8, 9, 10, 11} {
		if got := m.At(memory.GFN(i)); got != names.OfBlock(0, want).AsProven() {
			t.Errorf("after a written block: page %d is %s, want block(0, %d)", i, got, want)
		}
	}
	if read := m.Stats().Read; read == 0 || read > 16*page {
		t.Errorf("%d bytes of blocks read", read)
	}
}

// liar is an index that names blocks which are not there.
type liar struct{ digest [16]byte }

func (l liar) MayHold(uint64) bool { return true }
func (l liar) Blocks([16]byte) iter.Seq[uint64] {
	return slices.Values([]uint64{1 << 60, 1 << 48, 4, 3})
}
func (l liar) Digest(uint64) ([16]byte, bool) { return l.digest, true }

// TestPassBlocksInside: only blocks that a layer has name pages.
func TestPassBlocksInside(t *testing.T) {
	s := newSpace(t, 4<<20)
	content := random(rand.New(rand.NewPCG(11, 11)), 4*page+104)
	put(t, s, 0, content[3*page:4*page])
	put(t, s, 1, content[3*page:4*page])
	table := book{1: names.OfBlock(0, 4), 2: names.OfBlock(1, 0), 3: names.OfBlock(4000, 0).AsProven()}
	m := mustRun(t, names.Pass{Space: s, Table: table, Layers: []names.Layer{layerOf("", content, true, liar{digestOf(content[3*page : 4*page])})}})
	if a, b := m.At(0), m.At(1); a != names.OfBlock(0, 3).AsProven() || a != b {
		t.Errorf("named %s and %s, want block(0, 3)", a, b)
	}
}

// broken fails to read beyond its content.
type broken struct{ content []byte }

func (b broken) ReadAt(p []byte, off int64) (int, error) {
	n, _ := bytes.NewReader(b.content).ReadAt(p, off)
	if n < len(p) {
		return n, errors.New("input/output error")
	}
	return n, nil
}

// TestPassUnreadable: what cannot be read costs names, and is counted.
func TestPassUnreadable(t *testing.T) {
	s := newSpace(t, 4<<20)
	content := random(rand.New(rand.NewPCG(12, 12)), 10*page)
	table := book{}
	for i := range memory.GFN(10) {
		put(t, s, i, content[i*page:][:page])
		table[i] = names.OfBlock(0, uint64(i))
	}
	l := names.Layer{Size: int64(len(content)), Source: broken{content[:5*page+1]}}
	m := mustRun(t, names.Pass{Space: s, Table: table, Layers: []names.Layer{l}})
	for i := range memory.GFN(10) {
		if named := m.At(i) != 0; named != (i < 5) {
			t.Errorf("page %s: %s", i, m.At(i))
		}
	}
	if st := m.Stats(); st.Unreadable != 5 || st.Refuted != 0 {
		t.Errorf("%d reads failed, %d names refuted, want 5 and 0", st.Unreadable, st.Refuted)
	}
}

// TestPassFollowsRows: a long row of blocks is followed without XXH3, to its end
// and over the border of a frame.
func TestPassFollowsRows(t *testing.T) {
	s := newSpace(t, 8<<20)
	rng := rand.New(rand.NewPCG(16, 16))
	content := random(rng, 600*page)
	const first, end = 100, 690
	for i := range memory.GFN(700) {
		b := random(rng, page)
		if i >= first && i < end {
			b = content[(i-first)*page:][:page]
		}
		put(t, s, i, b)
	}
	for _, immutable := range []bool{true, false} {
		l := layerOf("", content, immutable, indexOf(content))
		reads := 0
		l.Source = counting{l.Source, &reads}
		m := mustRun(t, names.Pass{Space: s, Layers: []names.Layer{l}})
		for i := range memory.GFN(700) {
			want := names.Name(0)
			if i >= first && i < end {
				want = names.OfBlock(0, uint64(i-first)).AsProven()
			}
			if got := m.At(i); got != want {
				t.Fatalf("page %s is %s, want %s", i, got, want)
			}
		}
		// 128 pages up to where the row is long, and those from its end on.
		if st := m.Stats(); st.Hashed != (128+700-end)*page || st.Digested != (end-first+1)*page {
			t.Errorf("%d pages through XXH3 and %d through BLAKE3", st.Hashed/page, st.Digested/page)
		}
		if immutable != (reads == 0) || reads > 20 {
			t.Errorf("immutable %v: %d reads for a row of %d blocks", immutable, reads, end-first)
		}
	}
}

// counting counts reads.
type counting struct {
	io.ReaderAt
	reads *int
}

func (c counting) ReadAt(p []byte, off int64) (int, error) {
	*c.reads++
	return c.ReaderAt.ReadAt(p, off)
}

// TestPassBorders: a row goes on over the border of a frame. At the border of
// what another worker may name it begins anew, whoever names it.
func TestPassBorders(t *testing.T) {
	s := newSpace(t, 40<<20)
	content := random(rand.New(rand.NewPCG(17, 17)), 82*page)
	copy(content[51*page:], content[:31*page])
	put(t, s, 0, content[50*page:51*page])
	for _, start := range []memory.GFN{509, 4096 - 10} { // 51 to 81, equal to 0 to 30
		for i := range memory.GFN(31) {
			put(t, s, start+i, content[(51+i)*page:][:page])
		}
		put(t, s, start-1, content[50*page:51*page])
	}
	p := names.Pass{Space: s, Layers: []names.Layer{layerOf("", content, true, indexOf(content))}, Workers: 1}
	m := mustRun(t, p)
	for i := range memory.GFN(31) {
		if got, want := m.At(509+i), names.OfBlock(0, uint64(51+i)).AsProven(); got != want {
			t.Errorf("page %s is %s, want %s", 509+i, got, want)
		}
		want := names.OfBlock(0, uint64(51+i)).AsProven()
		if i >= 10 {
			want = names.OfBlock(0, uint64(i)).AsProven()
		}
		if got := m.At(4096 - 10 + i); got != want {
			t.Errorf("page %s is %s, want %s", 4096-10+i, got, want)
		}
	}
}
