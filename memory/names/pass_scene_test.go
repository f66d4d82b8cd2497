package names_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"iter"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

const page = memory.PageSize

// newSpace maps guest memory of small pages, so that only what a test touches
// is populated.
func newSpace(t testing.TB, size uint64) *memory.Space {
	t.Helper()
	s, err := memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

// put writes a page.
func put(t testing.TB, s *memory.Space, gfn memory.GFN, content []byte) {
	t.Helper()
	if err := s.WriteAt(content, gfn.GPA()); err != nil {
		t.Fatal(err)
	}
}

// view returns the content of a page.
func view(t testing.TB, s *memory.Space, gfn memory.GFN) []byte {
	t.Helper()
	b, err := s.View(gfn.GPA(), page)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// book is a table made of a map.
type book map[memory.GFN]names.Name

func (b book) Load(dst []names.Name, gfn memory.GFN) {
	for i := range dst {
		dst[i] = b[gfn+memory.GFN(i)]
	}
}

// memIndex is an index of bytes.
type memIndex struct {
	hashes  map[uint64]bool
	digests map[[16]byte][]uint64
	blocks  map[uint64][16]byte
}

func digestOf(b []byte) [16]byte {
	sum := blake3.Sum256(b)
	return [16]byte(sum[:16])
}

func indexOf(content []byte) *memIndex {
	x := &memIndex{map[uint64]bool{}, map[[16]byte][]uint64{}, map[uint64][16]byte{}}
	for n := range uint64(len(content) / page) {
		if b := content[n*page:][:page]; !isZeros(b) {
			d := digestOf(b)
			x.hashes[xxh3.Hash(b)] = true
			x.digests[d] = append(x.digests[d], n)
			x.blocks[n] = d
		}
	}
	return x
}

func (x *memIndex) MayHold(h uint64) bool                { return x.hashes[h] }
func (x *memIndex) Blocks(d [16]byte) iter.Seq[uint64]   { return slices.Values(x.digests[d]) }
func (x *memIndex) Digest(n uint64) (d [16]byte, _ bool) { d, ok := x.blocks[n]; return d, ok }

func isZeros(b []byte) bool { return bytes.Equal(b, make([]byte, len(b))) }

func random(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		binary.LittleEndian.PutUint64(b[i:], rng.Uint64())
	}
	return b
}

// layerOf makes a layer of content.
func layerOf(title string, content []byte, immutable bool, index names.Index) names.Layer {
	return names.Layer{Title: title, Size: int64(len(content)), Immutable: immutable, Source: bytes.NewReader(content), Index: index}
}

func mustRun(t testing.TB, p names.Pass) *names.Map {
	t.Helper()
	m, err := p.Run(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// gfns lists the pages of RAM.
func gfns(s *memory.Space) iter.Seq[memory.GFN] {
	return func(yield func(memory.GFN) bool) {
		for _, r := range s.Regions() {
			for gfn := r.Start.GFN(); gfn < r.End().GFN(); gfn++ {
				if !yield(gfn) {
					return
				}
			}
		}
	}
}

// scene is a memory with something of everything, and what is known of it.
type scene struct {
	space  *memory.Space
	table  book
	layers []names.Layer
	bytes  [][]byte // of the layers, as they are now
	// touched are the pages that were written.
	touched map[memory.GFN]bool
}

// newScene plants pages of every kind in the first pages of each region.
func newScene(t testing.TB, rng *rand.Rand, size uint64, pages int) *scene {
	c := &scene{space: newSpace(t, size), table: book{}, touched: map[memory.GFN]bool{}}
	common := random(rng, page) // a block that is everywhere
	for i, kind := range []struct{ immutable, indexed bool }{{true, true}, {true, false}, {false, true}, {false, false}, {true, true}} {
		content := random(rng, 300*page+104*(i%2))
		for range 20 {
			copy(content[rng.IntN(300)*page:], common)
			clear(content[rng.IntN(300)*page:][:page])
		}
		copy(content[200*page:250*page], content[100*page:])
		var index names.Index
		if kind.indexed {
			index = indexOf(content)
		}
		if !kind.immutable {
			// The index is stale where the layer was written since.
			for range 50 {
				copy(content[rng.IntN(300)*page:], random(rng, 8))
			}
		}
		c.layers = append(c.layers, layerOf("layer", content, kind.immutable, index))
		c.bytes = append(c.bytes, content)
	}
	pool := random(rng, 20*page)
	for _, r := range c.space.Regions() {
		for i := 0; i < min(pages, int(r.Size/page)); i++ {
			i += c.plant(t, rng, r.Start.GFN()+memory.GFN(i), min(pages, int(r.Size/page))-i, pool) - 1
		}
	}
	return c
}

// plant fills the page at gfn, and possibly some after it, up to room, and
// returns how many.
func (c *scene) plant(t testing.TB, rng *rand.Rand, gfn memory.GFN, room int, pool []byte) int {
	write := func(gfn memory.GFN, content []byte) {
		put(t, c.space, gfn, content)
		c.touched[gfn] = true
	}
	near := func(b []byte) []byte {
		b = bytes.Clone(b)
		b[rng.IntN(page)] ^= 1 << rng.IntN(8)
		return b
	}
	l := names.LayerID(rng.IntN(len(c.layers)))
	block := rng.IntN(300)
	content := c.bytes[l][block*page:][:page]
	switch rng.IntN(12) {
	case 0: // a hole, with a name or without
		c.hint(rng, gfn, names.OfBlock(l, uint64(block)))
	case 1:
		write(gfn, make([]byte, page))
		c.hint(rng, gfn, names.OfBlock(l, uint64(block)))
	case 2:
		write(gfn, near(make([]byte, page)))
	case 3:
		write(gfn, random(rng, page))
		c.hint(rng, gfn, names.OfBlock(names.LayerID(rng.IntN(10)), rng.Uint64N(400)))
	case 4, 5:
		write(gfn, pool[rng.IntN(20)*page:][:page])
	case 6:
		write(gfn, near(pool[rng.IntN(20)*page:][:page]))
	case 7:
		write(gfn, near(content))
		c.hint(rng, gfn, names.OfBlock(l, uint64(block)))
	case 8: // proven, or not yet
		write(gfn, content)
		name := names.OfBlock(l, uint64(block))
		if rng.IntN(2) == 0 {
			name = name.AsProven()
		}
		c.table[gfn] = name
	default: // a row of blocks
		n := min(1+rng.IntN(90), room, 300-block)
		for i := range n {
			write(gfn+memory.GFN(i), c.bytes[l][(block+i)*page:][:page])
			if rng.IntN(4) != 0 {
				c.table[gfn+memory.GFN(i)] = names.OfBlock(l, uint64(block+i))
			}
		}
		return n
	}
	return 1
}

// hint records a name that may be wrong, now and then.
func (c *scene) hint(rng *rand.Rand, gfn memory.GFN, n names.Name) {
	if rng.IntN(2) == 0 {
		c.table[gfn] = n
	}
}

func (c *scene) pass() names.Pass {
	return names.Pass{Space: c.space, Table: c.table, Layers: c.layers}
}

// check compares a map with what can be seen by looking at every page: no name
// may be wrong, and none may be missed that a step can find.
func (c *scene) check(t *testing.T, m *names.Map) {
	t.Helper()
	contents := map[string]memory.GFN{} // of pages without a name of a block, the lowest
	indexed := c.indexed()
	for gfn := range gfns(c.space) {
		n := m.At(gfn)
		if n != 0 && n.Proven() != m.Exact() {
			t.Fatalf("page %s: %s: proven is %v", gfn, n, n.Proven())
		}
		if !c.touched[gfn] {
			if n.Kind() != names.Zero || m.Populated(gfn) {
				t.Fatalf("untouched page %s: %s, populated %v", gfn, n, m.Populated(gfn))
			}
			continue
		}
		content := view(t, c.space, gfn)
		lowest, known := contents[string(content)]
		switch n.Kind() {
		case names.Zero:
			if !isZeros(content) {
				t.Fatalf("page %s is not zero", gfn)
			}
		case names.Block:
			if !bytes.Equal(content, c.bytes[n.Layer()][n.Number()*page:][:page]) {
				t.Fatalf("page %s is not %s", gfn, n)
			}
		case names.Page:
			if !known || lowest != memory.GFN(n.Number()) {
				t.Fatalf("page %s is %s, want page(%s) (%v)", gfn, n, lowest, known)
			}
		case names.None:
			hint := c.table[gfn]
			right := hint.Kind() == names.Block && int(hint.Layer()) < len(c.bytes) && hint.Number() < 300 &&
				bytes.Equal(content, c.bytes[hint.Layer()][hint.Number()*page:][:page])
			if isZeros(content) || known || right || indexed[string(content)] {
				t.Fatalf("page %s has no name: zero %v, page %s %v, hint %s right %v, in an index %v", gfn, isZeros(content), lowest, known, hint, right, indexed[string(content)])
			}
			contents[string(content)] = gfn
		default:
			t.Fatalf("page %s: %s", gfn, n)
		}
		if hint := c.table[gfn]; hint.Proven() && int(hint.Layer()) < len(c.layers) && n.AsProven() != hint {
			t.Fatalf("page %s: %s, proven %s", gfn, n, hint)
		}
	}
}

// indexed is what blocks hold that are where an index says.
func (c *scene) indexed() map[string]bool {
	found := map[string]bool{}
	for l, layer := range c.layers {
		if x, ok := layer.Index.(*memIndex); ok {
			for n, d := range x.blocks {
				b := c.bytes[l][n*page:][:page]
				// Of a written layer only a few blocks are tried.
				if digestOf(b) == d && (layer.Immutable || len(x.digests[d]) == 1) {
					found[string(b)] = true
				}
			}
		}
	}
	return found
}
