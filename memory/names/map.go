package names

import (
	"iter"

	"ditto.vm/memory"
)

// Map is what every page of a guest's memory equals, as a [Pass] found it. It
// takes 8 bytes and a bit for each page, and does not change.
type Map struct {
	layers  []Layer
	regions []mapRegion
	stats   PassStats
	exact   bool
	whole   bool // a page without a name was compared with everything
}

// mapRegion holds names[i] and bit i of populated for the region's page i.
type mapRegion struct {
	memory.Range
	names     []Name
	populated []uint64
}

// newMap returns the map of an untouched memory.
func newMap(space *memory.Space, layers []Layer) *Map {
	m := &Map{layers: layers}
	for _, r := range space.Regions() {
		pages := r.Size / memory.PageSize
		m.regions = append(m.regions, mapRegion{
			Range: r.Range, names: make([]Name, pages), populated: make([]uint64, (pages+63)/64),
		})
	}
	return m
}

// Exact reports whether nothing ran while the pass looked: every name is true,
// and says so by [Name.Proven], until a page is written. Of a VM that ran the
// map tells about how much there is of what, and no name may be relied on.
func (m *Map) Exact() bool { return m.exact }

// Layers returns the layers that [Name.Layer] numbers.
func (m *Map) Layers() []Layer { return m.layers }

// Regions returns the ranges of RAM in ascending order.
func (m *Map) Regions() []memory.Range {
	ranges := make([]memory.Range, len(m.regions))
	for i := range m.regions {
		ranges[i] = m.regions[i].Range
	}
	return ranges
}

// Stats tells how the map came about.
func (m *Map) Stats() PassStats { return m.stats }

// At returns the name of a page: None for one that equals nothing known, or
// lies outside RAM.
func (m *Map) At(gfn memory.GFN) Name {
	if r, i := m.find(gfn); r != nil {
		return r.names[i]
	}
	return 0
}

// Populated reports whether the host holds a page for it. Those it does not
// hold are named zero.
func (m *Map) Populated(gfn memory.GFN) bool {
	r, i := m.find(gfn)
	return r != nil && r.populated[i/64]>>(i%64)&1 != 0
}

// find returns the region of a page and its place there, or nil.
func (m *Map) find(gfn memory.GFN) (*mapRegion, uint64) {
	for i := range m.regions {
		if r := &m.regions[i]; r.Contains(gfn.GPA(), memory.PageSize) {
			return r, uint64(gfn.GPA()-r.Start) / memory.PageSize
		}
	}
	return nil, 0
}

// Run is a row of pages whose names follow from the first: all zero, all
// without a name, or numbers that count up with the pages.
type Run struct {
	Start memory.GFN
	Pages uint64
	Name  Name // of the first page
}

// Runs yields the map as maximal runs in ascending order. A run does not cross
// the border of a region.
func (m *Map) Runs() iter.Seq[Run] {
	return func(yield func(Run) bool) {
		for i := range m.regions {
			if !m.regions[i].runs(yield) {
				return
			}
		}
	}
}

// runs yields the region's runs and reports whether to go on.
func (r *mapRegion) runs(yield func(Run) bool) bool {
	start := r.Start.GFN()
	for i := 0; i < len(r.names); {
		first := r.names[i]
		step := first.step()
		n := 1
		for i+n < len(r.names) && r.names[i+n] == first+Name(n)*step {
			n++
		}
		if !yield(Run{Start: start + memory.GFN(i), Pages: uint64(n), Name: first}) {
			return false
		}
		i += n
	}
	return true
}

// step returns by how much the next page's name differs within a run.
func (n Name) step() Name {
	if k := n.Kind(); k == Block || k == Page {
		return 1
	}
	return 0
}
