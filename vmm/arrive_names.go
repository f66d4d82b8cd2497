package vmm

import (
	"context"
	"io"
	"sync"
	"sync/atomic"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/live"
)

// learned are the names by which pages have come from another host. They are
// hints, as those of I/O are: what came again as bytes, or was written since, will
// not be proven.
type learned struct {
	regions []memory.Region
	once    sync.Once
	words   [][]uint64 // of each region's pages: a [names.Name] with the offer's layer
	layers  []names.LayerID
	known   []bool
	at      int // the region that is next to be taught
}

func newLearned(mem *memory.Space) *learned { return &learned{regions: mem.Regions()} }

// layerReader reads a layer of the offer, and hears which pages equal its blocks.
type layerReader struct {
	io.ReaderAt
	number  int
	learned *learned
}

var _ live.Learner = (*layerReader)(nil)

// Learn implements [live.Learner].
func (r *layerReader) Learn(pages memory.Range, block uint64) {
	r.learned.note(pages, names.OfBlock(names.LayerID(r.number), block))
}

// note notes the names of pages in a row, of which name is the first's. It may be
// called from any goroutine.
func (l *learned) note(pages memory.Range, name names.Name) {
	l.once.Do(func() {
		l.words = make([][]uint64, len(l.regions))
		for i, r := range l.regions {
			l.words[i] = make([]uint64, r.Size>>memory.PageShift)
		}
	})
	for i, r := range l.regions {
		if !r.Contains(pages.Start, pages.Size) {
			continue
		}
		first := uint64(pages.Start-r.Start) >> memory.PageShift
		for n := range pages.Size >> memory.PageShift {
			atomic.StoreUint64(&l.words[i][first+n], uint64(name)+n)
		}
	}
}

// match finds the layers of an offer among those of the machine, which go on to be
// known by what they were known by.
func (l *learned) match(m *VM, o []live.Layer) {
	l.layers, l.known = make([]names.LayerID, len(o)), make([]bool, len(o))
	for i, layer := range o {
		if layer.Disk < 0 {
			l.layers[i], l.known[i] = m.naming.FileLayer(layer.Path)
		} else if layer.Disk < len(m.disks) {
			if here := m.disks[layer.Disk].image.Layers(); layer.Depth < len(here) && string(here[layer.Depth].Format()) == layer.Format {
				l.layers[i], l.known[i] = m.naming.ImageLayer(here[layer.Depth])
			}
		}
		if l.known[i] {
			m.naming.Identify(l.layers[i], layer.ID)
		}
	}
}

// teach records what was learned in the table, as far as no name stands there yet,
// until ctx ends; then it goes on where it was. The last gives the memory of what
// was learned back.
func (l *learned) teach(ctx context.Context, table *names.Table) {
	const atOnce = 1 << 12
	for ; l.at < len(l.words); l.at++ {
		words := l.words[l.at]
		for i, word := range words {
			if i%atOnce == 0 && ctx.Err() != nil {
				return
			}
			name := names.Name(word)
			if name == 0 || !l.known[name.Layer()] {
				continue
			}
			gpa := l.regions[l.at].Start + memory.GPA(i)<<memory.PageShift
			if table.At(gpa.GFN()) == 0 {
				table.Record(gpa, names.OfBlock(l.layers[name.Layer()], name.Number()))
			}
		}
		l.words[l.at] = nil
	}
}
