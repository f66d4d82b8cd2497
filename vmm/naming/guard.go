package naming

import (
	"errors"
	"fmt"
	"iter"
	"runtime"
	"runtime/debug"
	"sync/atomic"

	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/memory/names"
)

// guardedIndex is an index that somebody may change while it is mapped: cut
// short, its bytes are a fault, and altered ones may lead anywhere. The first
// such look-up, or a changed stamp, ends its use.
type guardedIndex struct {
	index *index.Index
	path  string
	file  *layer.File // the index, for its stamp
	stamp layer.Stamp
	layer names.LayerID
	// broken is why a look-up failed.
	broken atomic.Pointer[string]
	told   bool // guarded by Naming.mu
}

// openGuarded opens the index at path. The stamp is read before the bytes are
// checked, so that no later change is missed.
func openGuarded(path string) (*guardedIndex, error) {
	file, err := layer.OpenFile(path)
	if err != nil {
		return nil, err
	}
	g := &guardedIndex{path: path, file: file}
	if g.stamp, err = file.Stamp(); err == nil {
		g.index, err = index.Open(path)
	}
	if err != nil {
		return nil, errors.Join(err, file.Close())
	}
	return g, nil
}

func (g *guardedIndex) Close() error { return errors.Join(g.index.Close(), g.file.Close()) }

// guard is deferred around a look-up, with what [debug.SetPanicOnFault] was.
func (g *guardedIndex) guard(panicOnFault bool) {
	debug.SetPanicOnFault(panicOnFault)
	r := recover()
	if r == nil {
		return
	}
	err, ok := r.(runtime.Error)
	if !ok {
		panic(r)
	}
	why := fmt.Sprintf("it was changed while it was in use: %v", err)
	g.broken.CompareAndSwap(nil, &why)
}

// MayHold implements [names.Index].
func (g *guardedIndex) MayHold(xxh3 uint64) (may bool) {
	if g.broken.Load() != nil {
		return false
	}
	defer g.guard(debug.SetPanicOnFault(true))
	return g.index.MayHold(xxh3)
}

// Digest implements [names.Index].
func (g *guardedIndex) Digest(block uint64) (digest [16]byte, ok bool) {
	if g.broken.Load() != nil {
		return digest, false
	}
	defer g.guard(debug.SetPanicOnFault(true))
	return g.index.Digest(block)
}

// mostBlocks bounds how many blocks of one digest are told: whoever asks takes
// the first that fits.
const mostBlocks = 16

// Blocks implements [names.Index]. It yields the first blocks only.
func (g *guardedIndex) Blocks(digest [16]byte) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		var blocks [mostBlocks]uint64
		for _, block := range blocks[:g.find(digest, &blocks)] {
			if !yield(block) {
				return
			}
		}
	}
}

// find fills in blocks with the digest and returns how many.
func (g *guardedIndex) find(digest [16]byte, blocks *[mostBlocks]uint64) (n int) {
	if g.broken.Load() != nil {
		return 0
	}
	defer g.guard(debug.SetPanicOnFault(true))
	for block := range g.index.Blocks(digest) {
		if blocks[n] = block; n+1 == mostBlocks {
			return mostBlocks
		}
		n++
	}
	return n
}

// why says what is wrong with the index by now, "" for nothing.
func (g *guardedIndex) why() string {
	now, err := g.file.Stamp()
	if err != nil {
		return err.Error()
	}
	if d := g.stamp.Difference(now); d != "" {
		return d
	}
	if broken := g.broken.Load(); broken != nil {
		return *broken
	}
	return ""
}

// CheckIndexes takes indexes out of use that were changed while they were
// mapped, and says so once. Call it before and after a pass whose names are to
// be relied on.
func (n *Naming) CheckIndexes() (changed bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, g := range n.indexes {
		why := ""
		if !g.told {
			why = g.why()
		}
		if why == "" {
			continue
		}
		g.told, changed = true, true
		g.broken.CompareAndSwap(nil, &why)
		n.table.DropIndex(g.layer)
		n.log.Warn("an image's index was changed and is not used any more; names will be found without", "index", g.path, "err", why)
	}
	return changed
}
