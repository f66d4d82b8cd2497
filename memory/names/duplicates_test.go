package names_test

import (
	"encoding/binary"
	"math/rand/v2"
	"testing"

	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// collide fills a page so that all pages made with one pad have the same
// XXH3-64: two words meet keys of the public secret that make their products
// zero, and their sum does not change with x.
func collide(b []byte, x, pad uint32) {
	clear(b)
	binary.LittleEndian.PutUint64(b, uint64(x)<<32|0x396cfeb8)
	binary.LittleEndian.PutUint64(b[64:], uint64(pad-x)<<32|0x2c81017c)
}

// TestCollisions: pages that a guest made to collide get the right names, with
// work in proportion to their number.
func TestCollisions(t *testing.T) {
	const size, hashes, alone = 48 << 20, 3, 2000
	s := newSpace(t, size)
	mem, err := s.Writable(0, size)
	if err != nil {
		t.Fatal(err)
	}
	pages := size/page - alone
	copy(mem[pages*page:], random(rand.New(rand.NewPCG(1, 3)), alone*page))
	want := make([]names.Name, size/page)
	lowest := map[[2]uint32]int{}
	sums := map[uint64]bool{}
	for i := range pages {
		// Few contents at first, then many, some of them twice.
		x, pad := uint32(i%5), uint32(i%hashes)
		if i > 1000 {
			x = uint32(i * 7 % (pages * 3 / 4))
		}
		b := mem[i*page:][:page]
		collide(b, x, pad)
		sums[xxh3.Hash(b)] = true
		if first, ok := lowest[[2]uint32{x, pad}]; ok {
			want[i] = names.OfPage(uint64(first)).AsProven()
		} else {
			lowest[[2]uint32{x, pad}] = i
		}
	}
	if len(sums) != hashes {
		t.Fatalf("%d hashes of %d: the pages do not collide", len(sums), hashes)
	}
	m := mustRun(t, names.Pass{Space: s, Workers: 2})
	for i, n := range want {
		if got := m.At(memory.GFN(i)); got != n {
			t.Fatalf("page %d is %s, want %s", i, got, n)
		}
	}
	st := m.Stats()
	if st.Digested == 0 || st.Digested > uint64(pages*page) {
		t.Errorf("%d bytes went through BLAKE3, of %d that collide", st.Digested, pages*page)
	}
	if limit := uint64(6 * pages); st.Compared > limit {
		t.Errorf("%d comparisons for %d pages", st.Compared, pages)
	}
}

// TestFewCollisions: a few contents with one hash need no second round.
func TestFewCollisions(t *testing.T) {
	s := newSpace(t, 4<<20)
	for gfn := range memory.GFN(100) {
		b := make([]byte, page)
		collide(b, uint32(gfn)%4, 0)
		put(t, s, gfn, b)
	}
	m := mustRun(t, names.Pass{Space: s})
	for gfn := memory.GFN(4); gfn < 100; gfn++ {
		if want := names.OfPage(uint64(gfn) % 4).AsProven(); m.At(gfn) != want {
			t.Errorf("page %s is %s, want %s", gfn, m.At(gfn), want)
		}
	}
	if d := m.Stats().Digested; d != 0 {
		t.Errorf("%d bytes went through BLAKE3", d)
	}
}

// TestOneContent: memory full of one content is compared once a page.
func TestOneContent(t *testing.T) {
	const size = 32 << 20
	s := newSpace(t, size)
	mem, err := s.Writable(0, size)
	if err != nil {
		t.Fatal(err)
	}
	for i := range mem {
		mem[i] = 0xaa
	}
	m := mustRun(t, names.Pass{Space: s})
	sum := m.Summary()
	if sum.Unique != page || sum.Duplicate != size-page {
		t.Errorf("%+v", sum)
	}
	if got := m.Stats().Compared; got != size/page-1 {
		t.Errorf("%d comparisons", got)
	}
}
