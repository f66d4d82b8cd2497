package names

import (
	"bytes"
	"context"
	"encoding/binary"
	"math/bits"
	"time"

	"github.com/zeebo/blake3"
	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
)

// worker names frames, one after the other, on one core.
type worker struct {
	*passRun
	frame  frame
	row    row // of the unit
	blocks blockReader
	hasher *blake3.Hasher

	named            [stepCount]uint64 // pages
	time             [stepCount]time.Duration
	hashed, digested uint64 // pages
	refuted          uint64 // pages
	compared         uint64 // with each other, pages
}

// frame is the frame that a worker is at, or what a region has of it.
type frame struct {
	gfn  memory.GFN
	mem  []byte
	name []Name
	// populated are the region's bits of populated pages.
	populated []uint64
	// todo has a bit for each page that no step has named yet.
	todo [framePages / 64]uint64
	// hint holds what the table says of the page, or nothing.
	hint [framePages]Name
	// left are the region's bits of pages for the last step.
	left []uint64
	// before is the name of the page before the frame, or nothing.
	before Name
}

func newWorker(r *passRun) *worker {
	return &worker{passRun: r, hasher: blake3.New(), blocks: blockReader{layers: r.Layers}}
}

// page returns the content of the frame's page i.
func (f *frame) page(i int) []byte { return f.mem[i*memory.PageSize:][:memory.PageSize] }

// empty reports whether all pages are named.
func (f *frame) empty() bool {
	var any uint64
	for _, word := range f.todo {
		any |= word
	}
	return any == 0
}

// unit names a unit's pages. It fails when the context ends or the host does
// not say what is populated.
func (w *worker) unit(ctx context.Context, u unit) error {
	r := &w.m.regions[u.region]
	f := &w.frame
	f.before, w.row = 0, row{}
	for first := u.first; first < u.first+u.n; first += framePages {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		n := min(framePages, u.first+u.n-first)
		pages := memory.Range{Start: r.Start + memory.GPA(first*memory.PageSize), Size: uint64(n) * memory.PageSize}
		mem, err := w.Space.View(pages.Start, pages.Size)
		if err != nil {
			return err
		}
		f.gfn, f.mem, f.name = pages.Start.GFN(), mem, r.names[first:first+n]
		f.populated = r.populated[first/64 : (first+n+63)/64]
		f.left = w.left[u.region][first/64:]
		if err := w.nameFrame(pages); err != nil {
			return err
		}
		f.before = w.nameBefore(n)
	}
	return nil
}

// nameFrame takes the frame through the steps.
func (w *worker) nameFrame(pages memory.Range) error {
	f := &w.frame
	if w.Table != nil && w.steps&(StepProven|StepRecorded) != 0 {
		w.Table.Load(f.hint[:len(f.name)], f.gfn)
		if w.wholeProven() {
			return nil
		}
	}
	if err := markPopulated(w.Space, pages, f.populated); err != nil {
		return err
	}
	f.todo = [framePages / 64]uint64{}
	copy(f.todo[:], f.populated)
	for i := range f.name {
		if f.todo[i/64]>>(i%64)&1 == 0 {
			f.name[i] = ZeroPage | w.proven
		}
	}
	if w.Table != nil {
		w.step(StepProven, w.takeProven)
	}
	if w.steps&StepZero != 0 {
		w.step(StepZero, w.findZeros)
	}
	if w.Table != nil && w.steps&StepRecorded != 0 {
		w.step(StepRecorded, w.compareRecorded)
	}
	switch {
	case w.steps&StepIndex != 0 && len(w.indexed) > 0:
		w.step(StepIndex, w.lookUp)
	case w.steps&StepDuplicates != 0:
		w.step(StepDuplicates, w.lookUp)
	}
	return nil
}

// wholeProven takes the frame's names when all are proven, without asking the
// host what is populated, and reports whether they are.
func (w *worker) wholeProven() bool {
	if w.steps&StepProven == 0 {
		return false
	}
	start := time.Now()
	f := &w.frame
	for i := range f.name {
		n := f.hint[i]
		if !w.provenName(n) {
			return false
		}
		f.name[i] = n&^provenBit | w.proven
	}
	f.todo = [framePages / 64]uint64{}
	fill(f.populated, 0, len(f.name))
	w.named[StepProven.index()] += uint64(len(f.name))
	w.time[StepProven.index()] += time.Since(start)
	return true
}

// provenName reports whether a name from the table needs no look at the page.
// Of equal pages another may be the lowest by now.
func (w *worker) provenName(n Name) bool {
	return n.Proven() && n.Kind() != Page && inside(w.Layers, n)
}

// step runs one step and books its time.
func (w *worker) step(s Steps, run func()) {
	if w.frame.empty() {
		return
	}
	start := time.Now()
	run()
	w.time[s.index()] += time.Since(start)
}

// set names a page of the frame.
func (w *worker) set(s Steps, i int, n Name) {
	f := &w.frame
	f.name[i] = n&^provenBit | w.proven
	f.todo[i/64] &^= 1 << (i % 64)
	w.named[s.index()]++
}

// nameBefore returns the name of the page before the frame's page i, or
// nothing when the last step is to decide.
func (w *worker) nameBefore(i int) Name {
	f := &w.frame
	if i == 0 {
		return f.before
	}
	if i--; f.todo[i/64]>>(i%64)&1 != 0 {
		return 0
	}
	return f.name[i]
}

// takeProven takes what the table has proven. The rest of its names are hints.
func (w *worker) takeProven() {
	f := &w.frame
	for at, word := range f.todo {
		for ; word != 0; word &= word - 1 {
			i := at*64 + bits.TrailingZeros64(word)
			switch n := f.hint[i]; {
			case !inside(w.Layers, n):
				f.hint[i] = 0
			case w.steps&StepProven != 0 && w.provenName(n):
				w.set(StepProven, i, n)
			}
		}
	}
}

// inside reports whether the name, if it is of a block, is of one that its
// layer has.
func inside(layers []Layer, n Name) bool {
	if n.Kind() != Block {
		return true
	}
	l := int(n.Layer())
	return l < len(layers) && layers[l].Size > 0 && n.Number() < uint64(layers[l].Size)/BlockSize
}

// findZeros names pages of zeros.
func (w *worker) findZeros() {
	f := &w.frame
	for at, word := range f.todo {
		for ; word != 0; word &= word - 1 {
			if i := at*64 + bits.TrailingZeros64(word); isZero(f.page(i)) {
				w.set(StepZero, i, ZeroPage)
			}
		}
	}
}

var zeroPage [memory.PageSize]byte

// isZero reports whether a page is all zeros. It looks at two words first: most
// pages show there that they are not.
func isZero(page []byte) bool {
	return binary.NativeEndian.Uint64(page) == 0 &&
		binary.NativeEndian.Uint64(page[memory.PageSize/2:]) == 0 &&
		bytes.Equal(page, zeroPage[:])
}

// lookUp hashes what is left, 64 pages at a time so that they are still in the
// cache when those are hashed again that an index may hold.
func (w *worker) lookUp() {
	f := &w.frame
	var hashes [64]uint64
	for at := range f.todo {
		if w.steps&StepIndex != 0 {
			w.followRow(at)
		}
		word := f.todo[at]
		if word == 0 {
			continue
		}
		w.hashed += uint64(bits.OnesCount64(word))
		for b := word; b != 0; b &= b - 1 {
			i := bits.TrailingZeros64(b)
			hashes[i] = xxh3.Hash(f.page(at*64 + i))
		}
		if w.steps&StepIndex != 0 {
			for b := w.mayHold(word, &hashes); b != 0; b &= b - 1 {
				w.lookUpPage(at*64 + bits.TrailingZeros64(b))
			}
		}
		if w.steps&StepDuplicates != 0 {
			for b := f.todo[at]; b != 0; b &= b - 1 {
				i := bits.TrailingZeros64(b)
				f.name[at*64+i] = Name(hashes[i])
			}
			f.left[at] = f.todo[at]
		}
	}
}

// mayHold returns those pages of word that an index may hold.
func (w *worker) mayHold(word uint64, hashes *[64]uint64) uint64 {
	var may uint64
	for _, l := range w.indexed {
		index := w.Layers[l].Index
		for b := word &^ may; b != 0; b &= b - 1 {
			i := bits.TrailingZeros64(b)
			if index.MayHold(hashes[i]) {
				may |= 1 << i
			}
		}
	}
	return may
}

// markPopulated sets bit i of words for the ith page of r if it is populated.
func markPopulated(space *memory.Space, r memory.Range, words []uint64) error {
	return space.Populated(r, func(run memory.Range) {
		first := int(run.Start-r.Start) / memory.PageSize
		fill(words, first, first+int(run.Size)/memory.PageSize)
	})
}

// fill sets the bits [first, end).
func fill(words []uint64, first, end int) {
	for first < end {
		n := min(64-first%64, end-first)
		words[first/64] |= ^uint64(0) >> (64 - n) << (first % 64)
		first += n
	}
}
