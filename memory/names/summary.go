package names

import (
	"fmt"
	"iter"
	"math/bits"

	"ditto.vm/memory"
)

// Summary is how much memory equals what, in bytes. Every byte is counted once,
// under the first that fits.
type Summary struct {
	Bytes     uint64   // all of them
	Absent    uint64   // not populated: reads as zeros
	Zero      uint64   // populated, and zeros
	Layers    []uint64 // equal to blocks, by LayerID
	Parent    uint64   // equal to the same page of a parent snapshot
	Duplicate uint64   // equal to another page, which is not counted here
	Unique    uint64   // equal to nothing that is known
	Unknown   uint64   // populated, and not compared with everything
}

// FrameSummary is the summary of a large frame, or of what a region has of it.
type FrameSummary struct {
	memory.Range
	Summary
}

// Summary counts the whole map.
func (m *Map) Summary() Summary {
	s := m.newSummary()
	for i := range m.regions {
		m.count(&s, i, 0, len(m.regions[i].names))
	}
	return s
}

// Count counts the pages of the map that r touches.
func (m *Map) Count(r memory.Range) Summary {
	s := m.newSummary()
	for i := range m.regions {
		region := &m.regions[i]
		start, end := max(r.Start, region.Start), min(r.End(), region.End())
		if start < end {
			last := uint64(end-region.Start) + memory.PageSize - 1
			m.count(&s, i, int(uint64(start-region.Start)/memory.PageSize), int(last/memory.PageSize))
		}
	}
	return s
}

// Frames yields the summary of every large frame in ascending order.
func (m *Map) Frames() iter.Seq[FrameSummary] {
	return func(yield func(FrameSummary) bool) {
		for i := range m.regions {
			r := &m.regions[i]
			for first := 0; first < len(r.names); first += framePages {
				end := min(first+framePages, len(r.names))
				f := FrameSummary{Summary: m.newSummary()}
				f.Range = memory.Range{Start: r.Start + memory.GPA(first*memory.PageSize), Size: uint64(end-first) * memory.PageSize}
				m.count(&f.Summary, i, first, end)
				if !yield(f) {
					return
				}
			}
		}
	}
}

func (m *Map) newSummary() Summary { return Summary{Layers: make([]uint64, len(m.layers))} }

// count adds the pages [first, end) of a region.
func (m *Map) count(s *Summary, region, first, end int) {
	r := &m.regions[region]
	for first < end {
		n := min(64-first%64, end-first)
		populated := r.populated[first/64] >> (first % 64)
		s.add(r.names[first:first+n], populated, m.whole)
		first += n
	}
}

// add counts up to 64 pages. Whole says that a page without a name was compared
// with everything.
func (s *Summary) add(pages []Name, populated uint64, whole bool) {
	s.Bytes += uint64(len(pages)) * memory.PageSize
	s.Absent += uint64(len(pages)-bits.OnesCount64(populated<<(64-len(pages)))) * memory.PageSize
	for i, n := range pages {
		if populated>>i&1 == 0 {
			continue
		}
		switch k := n.Kind(); {
		case k == Zero:
			s.Zero += memory.PageSize
		case k == Block && int(n.Layer()) < len(s.Layers):
			s.Layers[n.Layer()] += memory.PageSize
		case k == Parent:
			s.Parent += memory.PageSize
		case k == Page:
			s.Duplicate += memory.PageSize
		case whole:
			s.Unique += memory.PageSize
		default:
			s.Unknown += memory.PageSize
		}
	}
}

// Sketch is the map that a table gives by itself: nothing of memory is read,
// names are taken whether proven or not, and what has none is unknown. The VM
// may be running.
func Sketch(space *memory.Space, table Recorded, layers []Layer) (*Map, error) {
	m := newMap(space, layers)
	for i := range m.regions {
		r := &m.regions[i]
		if err := markPopulated(space, r.Range, r.populated); err != nil {
			return nil, fmt.Errorf("sketch: %w", err)
		}
		for first := 0; first < len(r.names); first += 64 {
			sketch(table, layers, r.Start.GFN()+memory.GFN(first), r.names[first:min(first+64, len(r.names))], r.populated[first/64])
		}
	}
	return m, nil
}

// Glance is the summary of [Sketch], without the map: for looking again and
// again.
func Glance(space *memory.Space, table Recorded, layers []Layer) (Summary, error) {
	s := Summary{Layers: make([]uint64, len(layers))}
	var pages [64]Name
	var populated [unitPages / 64]uint64
	for _, region := range space.Regions() {
		for at := region.Start; at < region.End(); at += unitPages * memory.PageSize {
			r := memory.Range{Start: at, Size: min(unitPages*memory.PageSize, uint64(region.End()-at))}
			clear(populated[:])
			if err := markPopulated(space, r, populated[:]); err != nil {
				return Summary{}, fmt.Errorf("glance: %w", err)
			}
			n := int(r.Size / memory.PageSize)
			for first := 0; first < n; first += 64 {
				part := pages[:min(64, n-first)]
				sketch(table, layers, at.GFN()+memory.GFN(first), part, populated[first/64])
				s.add(part, populated[first/64], false)
			}
		}
	}
	return s, nil
}

// sketch fills in up to 64 names from the table.
func sketch(table Recorded, layers []Layer, gfn memory.GFN, pages []Name, populated uint64) {
	table.Load(pages, gfn)
	for i, n := range pages {
		switch {
		case populated>>i&1 == 0:
			pages[i] = ZeroPage
		case inside(layers, n):
			pages[i] = n &^ provenBit
		default:
			pages[i] = 0
		}
	}
}
