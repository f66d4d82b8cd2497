package vmm

import (
	"cmp"
	"context"
	"encoding/binary"
	"fmt"
	"slices"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/api"
)

// MemoryMap says place by place what guest memory equals and how it is mapped.
func (m *VM) MemoryMap(ctx context.Context, q api.MemoryQuery) (api.MemoryMap, error) {
	var out api.MemoryMap
	exact, err := m.look(ctx, q.Pause, func(ctx context.Context, still bool) error {
		all, err := m.pageNames(ctx, q.Full, still)
		if err != nil {
			return err
		}
		out = memoryMap(all)
		if err := m.refreshFrames(); err != nil {
			return err
		}
		out.Frames = m.frameBytes()
		return nil
	})
	if err != nil {
		return api.MemoryMap{}, fmt.Errorf("look at memory: %w", err)
	}
	out.Mode, out.Exact = memoryMode(q), exact
	return out, nil
}

// pageNames returns what every page equals, from the book alone or by a pass.
func (m *VM) pageNames(ctx context.Context, full, still bool) (*names.Map, error) {
	if err := m.settle(ctx, still); err != nil {
		return nil, err
	}
	if full {
		return m.namePages(ctx, still, nil)
	}
	table, layers := m.book()
	return names.Sketch(m.mem, table, layers)
}

// frameBytes returns a byte for each whole large frame, nothing if there is no
// book of them.
func (m *VM) frameBytes() []byte {
	out := []byte{}
	if m.frames == nil {
		return out
	}
	for _, r := range m.mem.Regions() {
		for n := range r.Size / memory.LargeFrameSize {
			state, why, _ := m.frames.At(r.Start + memory.GPA(n*memory.LargeFrameSize))
			out = append(out, byte(state)<<6|byte(why))
		}
	}
	return out
}

// classes numbers the classes of a map: those that every map has, and as many
// layers as fit, the largest.
type classes struct {
	list    []api.MemoryClass
	of      map[api.MemoryKind]int // but for layers
	layers  []int                  // class by LayerID
	unnamed int                    // of a page without a name
}

// commonClasses is how many classes besides layers a map can have.
const commonClasses = 7

func classify(s names.Summary, layers []names.Layer) *classes {
	c := &classes{of: make(map[api.MemoryKind]int), layers: make([]int, len(layers))}
	add := func(kind api.MemoryKind, title string, bytes uint64) int {
		c.list = append(c.list, api.MemoryClass{Kind: kind, Title: title, Bytes: bytes})
		return len(c.list) - 1
	}
	c.of[api.KindNotPopulated] = add(api.KindNotPopulated, "", s.Absent)
	c.of[api.KindZero] = add(api.KindZero, "", s.Zero)
	order := make([]int, len(layers))
	for i := range order {
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(s.Layers[b], s.Layers[a]) })
	shown := order[:min(len(order), api.MaxMapClasses-commonClasses)]
	slices.Sort(shown)
	other := uint64(0)
	for i := range layers {
		c.layers[i] = -1
		if _, ok := slices.BinarySearch(shown, i); ok {
			c.layers[i] = add(api.KindLayer, layers[i].Title, s.Layers[i])
		} else {
			other += s.Layers[i]
		}
	}
	if len(shown) < len(layers) {
		n := add(api.KindOtherLayers, "", other)
		for i := range c.layers {
			if c.layers[i] < 0 {
				c.layers[i] = n
			}
		}
	}
	if s.Parent > 0 {
		c.of[api.KindParent] = add(api.KindParent, "", s.Parent)
	}
	c.of[api.KindDuplicate] = add(api.KindDuplicate, "", s.Duplicate)
	c.of[api.KindUnique] = add(api.KindUnique, "", s.Unique)
	c.unnamed = c.of[api.KindUnique]
	if s.Unknown > 0 {
		c.of[api.KindUnknown] = add(api.KindUnknown, "", s.Unknown)
		c.unnamed = c.of[api.KindUnknown]
	}
	return c
}

// page returns the class of a page.
func (c *classes) page(n names.Name, populated bool) int {
	if !populated {
		return c.of[api.KindNotPopulated]
	}
	switch n.Kind() {
	case names.Zero:
		return c.of[api.KindZero]
	case names.Block:
		return c.layers[n.Layer()]
	case names.Page:
		return c.of[api.KindDuplicate]
	case names.Parent:
		return c.of[api.KindParent]
	}
	return c.unnamed
}

// counts adds the pages of a summary by class.
func (c *classes) counts(s names.Summary) []uint64 {
	out := make([]uint64, len(c.list))
	add := func(kind api.MemoryKind, bytes uint64) {
		if class, ok := c.of[kind]; ok {
			out[class] += bytes / memory.PageSize
		}
	}
	add(api.KindNotPopulated, s.Absent)
	add(api.KindZero, s.Zero)
	add(api.KindParent, s.Parent)
	add(api.KindDuplicate, s.Duplicate)
	add(api.KindUnique, s.Unique)
	add(api.KindUnknown, s.Unknown)
	for i, bytes := range s.Layers {
		out[c.layers[i]] += bytes / memory.PageSize
	}
	return out
}

// memoryMap is a map as the API tells it, within its bounds.
func memoryMap(all *names.Map) api.MemoryMap {
	summary := all.Summary()
	c := classify(summary, all.Layers())
	out := api.MemoryMap{Classes: c.list, CellBytes: cellBytes(all.Regions())}
	for _, r := range all.Regions() {
		out.Regions = append(out.Regions, api.MemoryRegion{Start: uint64(r.Start), Bytes: r.Size})
		if out.CellBytes == memory.PageSize {
			for gfn := r.Start.GFN(); gfn < r.End().GFN(); gfn++ {
				out.Pages = append(out.Pages, byte(c.page(all.At(gfn), all.Populated(gfn))))
			}
			continue
		}
		for gpa := r.Start; gpa < r.End(); gpa += memory.GPA(out.CellBytes) {
			cell := all.Count(memory.Range{Start: gpa, Size: min(out.CellBytes, uint64(r.End()-gpa))})
			for _, n := range c.counts(cell) {
				out.Counts = binary.LittleEndian.AppendUint16(out.Counts, uint16(n))
			}
		}
	}
	return out
}

// cellBytes returns the size of a cell that keeps a map within its bounds.
func cellBytes(regions []memory.Range) uint64 {
	pages := uint64(0)
	for _, r := range regions {
		pages += r.Size / memory.PageSize
	}
	if pages <= api.MaxMapPages {
		return memory.PageSize
	}
	for size := uint64(memory.LargeFrameSize); ; size *= 2 {
		cells := uint64(0)
		for _, r := range regions {
			cells += (r.Size + size - 1) / size
		}
		if cells <= api.MaxMapCells {
			return size
		}
	}
}
