package memmap

import (
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
)

// sizes are what the pictures must be legible for, with odd ones between.
var sizes = []struct {
	bytes  uint64
	layers int
}{
	{1<<20 + 12*PageSize, 1}, {16 << 20, 1}, {256 << 20, 2}, {300<<20 + PageSize, 1}, {1 << 30, 1}, {4 << 30, 3},
	{5<<30 + PageSize, 2}, {64 << 30, 9}, {200 << 30, 2},
}

// drawn returns a synthetic map that several tests draw and none changes: to
// make a large one takes a second.
func drawn(bytes uint64, layers int) *Map {
	key := [2]uint64{bytes, uint64(layers)}
	m, ok := made.Load(key)
	if !ok {
		m, _ = made.LoadOrStore(key, synthetic(bytes, layers, 1))
	}
	return m.(*Map)
}

var made sync.Map // of *Map

// synthetic returns a map that looks like a guest's memory: runs of blocks,
// zeros and unique pages, and frames whose mapping follows.
func synthetic(bytes uint64, layers int, seed uint64) *Map {
	rng := rand.New(rand.NewPCG(seed, 1))
	m := &Map{Name: "web", Notes: []string{"exact: the machine was paused for the count; every byte of memory was looked at"}}
	m.Regions = []Region{{0, min(bytes, 3<<30)}}
	if bytes > 3<<30 {
		m.Regions = append(m.Regions, Region{4 << 30, bytes - 3<<30})
	}
	m.Classes = []Class{{Kind: NotPopulated}, {Kind: Zero}}
	for i := range layers {
		m.Classes = append(m.Classes, Class{Kind: Layer, Title: fmt.Sprintf("/var/lib/ditto/images/debian-13-nocloud-%d.img", i)})
	}
	m.Classes = append(m.Classes, Class{Kind: Duplicate}, Class{Kind: Unique})
	unique := byte(len(m.Classes) - 1)
	pages := make([]byte, bytes/PageSize)
	for i := 0; i < len(pages); {
		class := byte(rng.IntN(len(m.Classes)))
		// Runs of a page are as likely as runs of a tenth of memory.
		n := int(math.Pow(float64(len(pages)/10), rng.Float64()))
		noisy := class != 0 && rng.IntN(3) == 0
		for ; n > 0 && i < len(pages); n-- {
			pages[i] = class
			if noisy && rng.IntN(12) == 0 {
				pages[i] = unique
			}
			i++
		}
	}
	page := 0
	for _, r := range m.Regions {
		for range r.Bytes / LargeFrameSize {
			m.Frames = append(m.Frames, frameOf(pages[page:page+512], rng))
			page += 512
		}
		page += int(r.Bytes % LargeFrameSize / PageSize)
	}
	m.fillCells(pages)
	return m
}

// frameOf is a likely mapping of a frame of such pages.
func frameOf(pages []byte, rng *rand.Rand) Frame {
	absent := 0
	for _, c := range pages {
		if c == 0 {
			absent++
		}
	}
	switch {
	case absent == len(pages):
		return Frame(Empty << 6)
	case absent > 0:
		return Frame(Small<<6) | 1<<4
	case rng.IntN(6) == 0:
		return Frame(Small<<6) | Frame(rng.IntN(16))
	}
	return Frame(Large << 6)
}

// fillCells puts the pages into the map as the control API does.
func (m *Map) fillCells(pages []byte) {
	for _, c := range pages {
		m.Classes[c].Bytes += PageSize
	}
	m.CellBytes = PageSize
	if len(pages) <= maxPages {
		m.Pages = pages
		return
	}
	m.CellBytes = LargeFrameSize
	for uint64(len(pages))*PageSize/m.CellBytes > maxCells {
		m.CellBytes *= 2
	}
	at := 0
	for _, r := range m.Regions {
		left := int(r.Bytes / PageSize)
		for range m.cells(r) {
			counts := make([]uint16, len(m.Classes))
			n := min(left, int(m.CellBytes/PageSize))
			for _, c := range pages[at : at+n] {
				counts[c]++
			}
			m.Counts = append(m.Counts, counts...)
			at, left = at+n, left-n
		}
	}
}
