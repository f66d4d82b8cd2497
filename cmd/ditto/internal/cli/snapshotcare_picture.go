package cli

import (
	"path/filepath"
	"time"

	"ditto.vm/internal/memmap"
	"ditto.vm/migration/snapshot"
)

// maxPictureLayers is how many layers of a snapshot have colours; further ones
// share one.
const maxPictureLayers = 9

// Above dotsBytes of memory pictures have a tile for each so many bytes instead
// of a dot for each page.
const (
	dotsBytes = 4 << 30
	maxTiles  = 1 << 15
)

// snapshotPicture is what a snapshot holds, to be drawn.
func snapshotPicture(s *snapshot.Snapshot) *memmap.Map {
	m := s.Manifest()
	name := machineName(m)
	if name == "" {
		name = filepath.Base(s.Dir())
	}
	p := &picture{Map: &memmap.Map{
		Name: name, CellBytes: memmap.PageSize,
		Notes: []string{"snapshot " + s.Dir(), "saved " + m.Created.Local().Format(time.DateTime) + ", by ditto " + m.Ditto},
	}}
	for _, r := range m.Memory.Regions {
		p.Regions = append(p.Regions, memmap.Region{Start: r.Start, Bytes: r.Size})
	}
	p.classify(s)
	if m.Memory.Size > dotsBytes {
		for p.CellBytes = memmap.LargeFrameSize; m.Memory.Size/p.CellBytes > maxTiles; p.CellBytes *= 2 {
			continue
		}
	}
	p.fill(s)
	return p.Map
}

// picture is a map that is being made.
type picture struct {
	*memmap.Map
	of     map[snapshot.Kind]int // class, but for blocks
	layers []int                 // class
}

// classify makes the classes: zeros, layers, and what else there is.
func (p *picture) classify(s *snapshot.Snapshot) {
	holds := s.Manifest().Holds
	p.of = make(map[snapshot.Kind]int)
	add := func(kind memmap.Kind, title string, bytes uint64) int {
		p.Classes = append(p.Classes, memmap.Class{Kind: kind, Title: title, Bytes: bytes})
		return len(p.Classes) - 1
	}
	p.of[snapshot.Zero] = add(memmap.Zero, "", holds.Zero)
	named := namedBytes(s)
	p.layers = make([]int, len(named))
	for i := range p.layers {
		p.layers[i] = -1
	}
	rest := holds.Blocks
	for _, i := range largest(named, maxPictureLayers) {
		if named[i] > 0 {
			p.layers[i] = add(memmap.Layer, s.Manifest().Layers[i].Path, named[i])
			rest -= named[i]
		}
	}
	if rest > 0 {
		other := add(memmap.OtherLayers, "", rest)
		for i, class := range p.layers {
			if class < 0 {
				p.layers[i] = other
			}
		}
	}
	if holds.Parent > 0 {
		p.of[snapshot.FromParent] = add(memmap.Parent, "", holds.Parent)
	}
	p.of[snapshot.Page] = add(memmap.Duplicate, "", holds.Duplicate)
	p.of[snapshot.Unique] = add(memmap.Unique, "", holds.Unique)
}

// fill writes down the class of each page, or counts them by cell.
func (p *picture) fill(s *snapshot.Snapshot) {
	class := func(r snapshot.Run) int {
		if r.Kind == snapshot.Block {
			return p.layers[r.Layer]
		}
		return p.of[r.Kind]
	}
	if p.CellBytes == memmap.PageSize {
		for _, r := range s.Runs() {
			for range r.Pages {
				p.Pages = append(p.Pages, byte(class(r)))
			}
		}
		return
	}
	cells := make([]int, len(p.Regions)+1) // before each region
	for i, r := range p.Regions {
		cells[i+1] = cells[i] + int((r.Bytes+p.CellBytes-1)/p.CellBytes)
	}
	p.Counts = make([]uint16, cells[len(p.Regions)]*len(p.Classes))
	region := 0
	for _, r := range s.Runs() {
		start, end := uint64(r.Range().Start), uint64(r.Range().End())
		for start >= p.Regions[region].Start+p.Regions[region].Bytes {
			region++
		}
		for start < end {
			cell := (start - p.Regions[region].Start) / p.CellBytes
			n := min(end, p.Regions[region].Start+(cell+1)*p.CellBytes) - start
			p.Counts[(cells[region]+int(cell))*len(p.Classes)+class(r)] += uint16(n / memmap.PageSize)
			start += n
		}
	}
}
