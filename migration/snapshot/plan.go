package snapshot

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"slices"

	"ditto.vm/memory"
)

// Plan is how to restore memory without reading it. What is neither mapped nor
// copied is zeros, and stays as it was made.
type Plan struct {
	// Maps are rows to be mapped privately, in ascending order. The files do not
	// change, and are open as long as the snapshot.
	Maps []memory.FileRange
	// Copy are the pages to be read, when they are touched or before.
	Copy *memory.PageSet
	// Mapped and Copied are bytes.
	Mapped, Copied uint64
}

// PlanOptions bound what mapping costs. A mapping is one more VMA, of which a
// process has 65530 unless vm.max_map_count says else.
type PlanOptions struct {
	// MinPages is the shortest row to be mapped; at least 1.
	MinPages uint64
	// MaxMappings bounds the rows that are mapped: the longest are. Zero means
	// 16384.
	MaxMappings int
	// Copied says of a layer of the snapshot or of an ancestor that pages are not
	// to be mapped from it: somebody may write it. Nil is for none.
	Copied func(of *Snapshot, layer int) bool
}

const defaultMappings = 16384

// Plan returns how to restore lazily. It checks the layers, see
// [Snapshot.CheckLayers]; mapped pages are not checked any more after that.
func (s *Snapshot) Plan(ctx context.Context, o PlanOptions) (*Plan, error) {
	if err := s.CheckLayers(ctx); err != nil {
		return nil, err
	}
	if o.MaxMappings <= 0 {
		o.MaxMappings = defaultMappings
	}
	p := &planning{Plan: Plan{Copy: memory.NewPageSet(s.m.regions())}, o: o, copied: make(map[layerKey]bool)}
	for i := range s.runs() {
		if err := p.plan(s.run(i)); err != nil {
			return nil, fmt.Errorf("plan the restore of %s: %w", s.dir, err)
		}
	}
	p.end()
	p.bound()
	for _, r := range p.Maps {
		p.Mapped += r.Size
	}
	p.Copied = p.Copy.Count() * memory.PageSize
	return &p.Plan, nil
}

// planning is a plan on its way.
type planning struct {
	Plan
	o   PlanOptions
	row memory.FileRange // to be mapped, of size zero for none
	// copied keeps what was said of layers.
	copied map[layerKey]bool
}

// layerKey is a layer of a snapshot of a chain.
type layerKey struct {
	of    *Snapshot
	layer int
}

// mappable returns what a run's layer can be mapped by, if it may be.
func (p *planning) mappable(f flatRun) (Extenter, bool, error) {
	file, err := f.src.layer(f.Layer)
	if err != nil {
		return nil, false, err
	}
	key := layerKey{f.src, f.Layer}
	copied, ok := p.copied[key]
	if !ok {
		copied = p.o.Copied != nil && p.o.Copied(f.src, f.Layer)
		p.copied[key] = copied
	}
	layer, ok := file.(Extenter)
	return layer, ok && !copied, nil
}

// plan adds a run.
func (p *planning) plan(f flatRun) error {
	switch {
	case f.Kind == Zero:
	case f.Kind == Unique && !f.src.p.compressed():
		p.file(f.Range(), f.src.pages, int64(f.Number)*memory.PageSize)
	case f.Kind == Block:
		return p.blocks(f)
	default:
		r := f.Range()
		p.Copy.Add(r.Start, r.Size)
	}
	return nil
}

// blocks adds a run of blocks, to be mapped as far as their layer can be.
func (p *planning) blocks(f flatRun) error {
	layer, ok, err := p.mappable(f)
	if err != nil {
		return err
	}
	for r := f.Run; ; {
		part := r.Range()
		if !ok {
			p.Copy.Add(part.Start, part.Size)
			return nil
		}
		os, at, size := layer.Extent(int64(r.Number) * memory.PageSize)
		n := min(uint64(max(size, 0))/memory.PageSize, r.Pages)
		if part.Size = n * memory.PageSize; os == nil || n == 0 || at%memory.PageSize != 0 {
			n = 1
			p.Copy.Add(part.Start, memory.PageSize)
		} else {
			p.file(part, os, at)
		}
		if n == r.Pages {
			return nil
		}
		r = r.cut(r.Start+memory.GFN(n), r.End())
	}
}

// file adds pages that are stored in a file as they are.
func (p *planning) file(r memory.Range, f *os.File, at int64) {
	if p.row.Size > 0 && p.row.End() == r.Start && p.row.File == f && p.row.Offset+int64(p.row.Size) == at {
		p.row.Size += r.Size
		return
	}
	p.end()
	p.row = memory.FileRange{Range: r, File: f, Offset: at}
}

// end ends the row: it is mapped if it is long enough.
func (p *planning) end() {
	switch {
	case p.row.Size == 0:
	case p.row.Size < p.o.MinPages*memory.PageSize:
		p.Copy.Add(p.row.Start, p.row.Size)
	default:
		p.Maps = append(p.Maps, p.row)
	}
	p.row = memory.FileRange{}
}

// bound leaves the longest rows to be mapped.
func (p *planning) bound() {
	if len(p.Maps) <= p.o.MaxMappings {
		return
	}
	slices.SortStableFunc(p.Maps, func(a, b memory.FileRange) int { return cmp.Compare(b.Size, a.Size) })
	for _, r := range p.Maps[p.o.MaxMappings:] {
		p.Copy.Add(r.Start, r.Size)
	}
	p.Maps = p.Maps[:p.o.MaxMappings]
	slices.SortFunc(p.Maps, func(a, b memory.FileRange) int { return cmp.Compare(a.Start, b.Start) })
}
