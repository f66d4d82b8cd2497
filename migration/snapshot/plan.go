package snapshot

import (
	"context"
	"fmt"
	"os"
	"slices"

	"ditto.vm/memory"
)

// Action is what a restore does with a range.
type Action int

// The actions. The zero value is none.
const (
	// Leave: the range is zeros; it stays as it was made.
	Leave Action = 1 + iota
	// Map: the range is mapped privately from a file, which never changes.
	Map
	// Copy: pages are read, when they are touched or before.
	Copy
)

// Step is what a restore does with a range of memory.
type Step struct {
	memory.Range
	Action Action
	// File and Offset, in bytes and a multiple of a page, are what to map. The
	// file is open as long as the snapshot.
	File   *os.File
	Offset int64
}

// Plan is how to restore memory without reading it: steps in ascending order
// that cover all of it.
type Plan struct {
	Steps []Step
	// Mappings counts the steps that map, Left, Mapped and Copied are bytes.
	Mappings             int
	Left, Mapped, Copied uint64
}

// PlanOptions bound what mapping costs. A mapping is one more VMA, of which a
// process has 65530 unless vm.max_map_count says else.
type PlanOptions struct {
	// MinPages is the shortest row to be mapped; at least 1.
	MinPages uint64
	// MaxMappings bounds the rows that are mapped: the longest are. Zero means
	// 16384.
	MaxMappings int
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
	p := &Plan{Steps: make([]Step, 0, len(s.flat))}
	for _, f := range s.flat {
		if err := p.plan(f); err != nil {
			return nil, fmt.Errorf("plan the restore of %s: %w", s.dir, err)
		}
	}
	p.bound(o)
	for _, step := range p.Steps {
		switch step.Action {
		case Leave:
			p.Left += step.Size
		case Map:
			p.Mapped += step.Size
			p.Mappings++
		case Copy:
			p.Copied += step.Size
		}
	}
	return p, nil
}

// plan appends the steps of a run.
func (p *Plan) plan(f flatRun) error {
	step := Step{Range: f.Range(), Action: Copy}
	switch {
	case f.Kind == Zero:
		step.Action = Leave
	case f.Kind == Unique && !f.src.p.compressed():
		step.Action, step.File, step.Offset = Map, f.src.pages, int64(f.Number)*memory.PageSize
	case f.Kind == Block:
		return p.planBlocks(f)
	}
	p.add(step)
	return nil
}

// planBlocks appends the steps of a run of blocks, as far as their layer can be
// mapped.
func (p *Plan) planBlocks(f flatRun) error {
	file, err := f.src.layer(f.Layer)
	if err != nil {
		return err
	}
	layer, ok := file.(Extenter)
	if !ok {
		p.add(Step{Range: f.Range(), Action: Copy})
		return nil
	}
	for r := f.Run; r.Pages > 0; {
		os, at, size := layer.Extent(int64(r.Number) * memory.PageSize)
		n := min(uint64(max(size, 0))/memory.PageSize, r.Pages)
		step := Step{Action: Map, File: os, Offset: at}
		if os == nil || n == 0 || at%memory.PageSize != 0 {
			n, step = 1, Step{Action: Copy}
		}
		step.Range = r.cut(r.Start, r.Start+memory.GFN(n)).Range()
		p.add(step)
		if n == r.Pages {
			return nil
		}
		r = r.cut(r.Start+memory.GFN(n), r.End())
	}
	return nil
}

// add appends a step, or lets the last one grow.
func (p *Plan) add(s Step) {
	if n := len(p.Steps); n > 0 {
		last := &p.Steps[n-1]
		follows := s.Action != Map || last.File == s.File && last.Offset+int64(last.Size) == s.Offset
		if last.End() == s.Start && last.Action == s.Action && follows {
			last.Size += s.Size
			return
		}
	}
	p.Steps = append(p.Steps, s)
}

// bound turns the shortest rows to be mapped into ones to be copied.
func (p *Plan) bound(o PlanOptions) {
	all, sizes := 0, []uint64(nil)
	for _, s := range p.Steps {
		if s.Action != Map {
			continue
		}
		if all++; s.Size >= o.MinPages*memory.PageSize {
			sizes = append(sizes, s.Size)
		}
	}
	if all <= o.MaxMappings && len(sizes) == all {
		return
	}
	shortest, ties := o.MinPages*memory.PageSize, len(sizes)
	if len(sizes) > o.MaxMappings {
		slices.SortFunc(sizes, func(a, b uint64) int { return int(int64(b) - int64(a)) })
		shortest = sizes[o.MaxMappings-1]
		ties = o.MaxMappings - slices.Index(sizes, shortest)
	}
	steps := p.Steps
	p.Steps = p.Steps[:0] // what is added never overtakes what is read
	for _, s := range steps {
		if s.Action == Map {
			if s.Size == shortest {
				ties--
			}
			if s.Size < shortest || s.Size == shortest && ties < 0 {
				s = Step{Range: s.Range, Action: Copy}
			}
		}
		p.add(s)
	}
}
