package names

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"ditto.vm/memory"
)

// Table holds the name of every page of guest memory, and finds the pages that
// are named after a block: 16 bytes a page, 0.4 % of memory. Its methods may be
// called from any goroutine.
//
// Names of blocks are recorded by the I/O hooks and by [Table.Record], always
// provisionally; a [Prover] proves them.
type Table struct {
	pages   uint64
	regions []tableRegion
	words   []uint64 // one a page, see word
	inverse inverse
	frames  []uint64 // one a large frame, see frameCount
	lazy    lazy     // holds the arrays
	changes changes
	stats   counters
	lost    atomic.Pointer[memory.PageSet] // of [Table.Follow]

	mu     sync.Mutex                     // orders AddLayer
	layers atomic.Pointer[[]*sharedLayer] // replaced, never changed
}

// tableRegion is a RAM region with the number of its first page.
type tableRegion struct {
	memory.Range
	first uint32
}

// sharedLayer is a layer with what changes about it.
type sharedLayer struct {
	Layer
	blocks    atomic.Uint64 // whole blocks that may name pages
	unindexed atomic.Bool   // the index is not used any more
	immutable atomic.Bool
}

// frameCount counts what is in a large frame: 63..32 changes, which wrap,
// 31..16 pages with a word, 15..0 pages that are proven or being proven. A count
// is raised before the word appears and lowered after it has gone.
type frameCount uint64

const (
	oneVouched   = 1
	oneUsed      = 1 << 16
	oneActivity  = 1 << 32
	frameShift   = 9 // pages of a large frame
	pagesOfFrame = 1 << frameShift
	mostBlocks   = 1 << blockBits
	halfCountMax = 1<<16 - 1
)

func (f frameCount) activity() uint32 { return uint32(f >> 32) }
func (f frameCount) used() int        { return int(f >> 16 & halfCountMax) }
func (f frameCount) vouched() int     { return int(f & halfCountMax) }

// Errors of [Table.AddLayer].
var (
	// ErrTooManyLayers: names have room for 4096.
	ErrTooManyLayers = errors.New("too many layers")
	// ErrLayerTooLarge: names have room for 2^44 blocks.
	ErrLayerTooLarge = errors.New("the layer is too large")
)

// NewTable returns the table of a guest's memory, without names.
func NewTable(s *memory.Space) *Table {
	t := &Table{}
	for _, r := range s.Regions() {
		t.regions = append(t.regions, tableRegion{Range: r.Range, first: uint32(t.pages)})
		// A frame never holds pages of two regions.
		t.pages += (r.Size>>memory.PageShift + pagesOfFrame - 1) &^ (pagesOfFrame - 1)
	}
	t.words = zeroed[uint64](&t.lazy, t.pages)
	t.inverse = newInverse(&t.lazy, t.pages)
	t.frames = zeroed[uint64](&t.lazy, t.pages>>frameShift)
	t.layers.Store(&[]*sharedLayer{})
	return t
}

// Close gives the table's memory back. Nobody may use the table any more.
func (t *Table) Close() error {
	t.words, t.frames, t.inverse.heads, t.inverse.next = nil, nil, nil, nil
	return t.lazy.close()
}

// AddLayer makes the blocks of a layer known.
func (t *Table) AddLayer(l Layer) (LayerID, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old := *t.layers.Load()
	switch {
	case len(old) == MaxLayers:
		return 0, fmt.Errorf("layer %s: %w", l.Title, ErrTooManyLayers)
	case l.Size/BlockSize > mostBlocks:
		return 0, fmt.Errorf("layer %s of %d bytes: %w", l.Title, l.Size, ErrLayerTooLarge)
	}
	added := &sharedLayer{Layer: l}
	added.blocks.Store(uint64(max(l.Size, 0) / BlockSize))
	added.immutable.Store(l.Immutable)
	layers := append(old[:len(old):len(old)], added)
	t.layers.Store(&layers)
	return LayerID(len(old)), nil
}

// Layers returns the layers in the order of their numbers, with their sizes as
// they are now.
func (t *Table) Layers() []Layer {
	shared := *t.layers.Load()
	layers := make([]Layer, len(shared))
	for i, s := range shared {
		layers[i] = s.Layer
		layers[i].Immutable = s.immutable.Load()
		if blocks := s.blocks.Load(); blocks != uint64(s.Size)/BlockSize {
			layers[i].Size = int64(blocks) * BlockSize
		}
		if s.unindexed.Load() {
			layers[i].Index = nil
		}
	}
	return layers
}

// DropIndex says that a layer's index may be wrong: passes that begin later do
// without.
func (t *Table) DropIndex(l LayerID) {
	if layer := t.layer(l); layer != nil {
		layer.unindexed.Store(true)
	}
}

// layer returns a layer, or nil.
func (t *Table) layer(l LayerID) *sharedLayer {
	layers := *t.layers.Load()
	if int(l) >= len(layers) {
		return nil
	}
	return layers[l]
}

// At returns the name of a page, which is none while I/O has it. A proven name
// is true as long as the tracker does not report the page: see [Prover.Settle].
func (t *Table) At(gfn memory.GFN) Name {
	page, ok := t.page(gfn.GPA())
	if !ok {
		return 0
	}
	return t.load(page).name()
}

// Load fills dst with the names of the pages from gfn on, which lie in one RAM
// region.
func (t *Table) Load(dst []Name, gfn memory.GFN) {
	first, ok := t.page(gfn.GPA())
	if !ok {
		clear(dst)
		return
	}
	words := t.words[first:min(uint64(first)+uint64(len(dst)), t.pages)]
	for i := range words {
		dst[i] = word(atomic.LoadUint64(&words[i])).name()
	}
	clear(dst[len(words):])
}

// page returns the number of the page that holds gpa, and whether it is RAM.
func (t *Table) page(gpa memory.GPA) (uint32, bool) {
	for i := range t.regions {
		if r := &t.regions[i]; r.Contains(gpa, 1) {
			return r.first + uint32((gpa-r.Start)>>memory.PageShift), true
		}
	}
	return 0, false
}

// gpa returns the address of a page.
func (t *Table) gpa(page uint32) memory.GPA {
	r := &t.regions[0]
	for i := range t.regions {
		if t.regions[i].first <= page {
			r = &t.regions[i]
		}
	}
	return r.Start + memory.GPA(page-r.first)<<memory.PageShift
}

// eachPage calls f for every page that r touches and that has a word.
func (t *Table) eachPage(r memory.Range, f func(page uint32, w word)) {
	for i := range t.regions {
		region := &t.regions[i]
		start, end := max(r.Start, region.Start), min(r.End(), region.End())
		if start >= end {
			continue
		}
		page := region.first + uint32((start-region.Start)>>memory.PageShift)
		last := region.first + uint32((end-1-region.Start)>>memory.PageShift)
		for page <= last {
			if page%pagesOfFrame == 0 && frameCount(atomic.LoadUint64(&t.frames[page>>frameShift])).used() == 0 {
				page += pagesOfFrame
				continue
			}
			if w := t.load(page); w != 0 {
				f(page, w)
			}
			page++
		}
	}
}

// count reads the counts of a frame.
func (t *Table) count(frame int) frameCount { return frameCount(atomic.LoadUint64(&t.frames[frame])) }

// swap changes the word of a page from old to now, and the counts of its frame
// with it. It returns false when the word is another.
func (t *Table) swap(page uint32, old, now word) bool {
	frame := &t.frames[page>>frameShift]
	var up, down uint64
	switch {
	case old == 0 && now != 0:
		up = oneUsed
	case old != 0 && now == 0:
		down = oneUsed
	}
	switch {
	case now.vouched() && !old.vouched():
		up += oneVouched
	case old.vouched() && !now.vouched():
		down += oneVouched
	}
	if up != 0 {
		atomic.AddUint64(frame, up)
	}
	if !atomic.CompareAndSwapUint64(&t.words[page], uint64(old), uint64(now)) {
		if up != 0 {
			atomic.AddUint64(frame, -up)
		}
		return false
	}
	if old.kind() != kindNamed || now.kind() != kindNamed {
		down -= oneActivity
	}
	if old.kind() == kindNamed && now.kind() != kindNamed {
		t.lose(page)
	}
	if down != 0 {
		atomic.AddUint64(frame, -down)
	}
	return true
}
