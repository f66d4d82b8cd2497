package names

import (
	"bytes"

	"ditto.vm/memory"
)

// maxTries bounds how many blocks of a written layer are read for one page: an
// index may list a common block many times.
const maxTries = 4

// compareRecorded holds pages against the blocks that the table suggests, a row
// of blocks at a time.
func (w *worker) compareRecorded() {
	f := &w.frame
	for i := 0; i < len(f.name); {
		n := w.hinted(i)
		switch l := w.Layers; {
		case n == 0:
			i++
			continue
		case l[f.hint[i].Layer()].Immutable && l[f.hint[i].Layer()].Index != nil:
			w.compareDigests(i, n)
		default:
			w.compareBytes(i, n)
		}
		i += n
	}
}

// hinted returns how many pages from i on may equal as many neighbouring
// blocks.
func (w *worker) hinted(i int) int {
	f := &w.frame
	hint := f.hint[i] &^ provenBit
	if hint.Kind() != Block {
		return 0
	}
	n := 0
	for j := i; j < len(f.name) && f.todo[j/64]>>(j%64)&1 != 0 && f.hint[j]&^provenBit == hint+Name(n); j++ {
		n++
	}
	return n
}

// compareDigests compares n pages from i on with the digests of their blocks.
func (w *worker) compareDigests(i, n int) {
	f := &w.frame
	for end := i + n; i < end; i++ {
		want, ok := w.Layers[f.hint[i].Layer()].Index.Digest(f.hint[i].Number())
		if ok && w.digest(f.page(i)) == want {
			w.set(StepRecorded, i, f.hint[i])
		} else {
			w.refuted++
		}
	}
}

// compareBytes compares n pages from i on with their blocks.
func (w *worker) compareBytes(i, n int) {
	f := &w.frame
	for end := i + n; i < end; {
		got := w.blocks.at(f.hint[i].Layer(), f.hint[i].Number(), end-i)
		if len(got) == 0 {
			i++ // unreadable
			continue
		}
		for ; len(got) > 0; i, got = i+1, got[BlockSize:] {
			if bytes.Equal(f.page(i), got[:BlockSize]) {
				w.set(StepRecorded, i, f.hint[i])
			} else {
				w.refuted++
			}
		}
	}
}

// digest returns the digest of a page.
func (w *worker) digest(page []byte) (d [16]byte) {
	w.digested++
	var sum [32]byte
	w.hasher.Reset()
	_, _ = w.hasher.Write(page)
	w.hasher.Sum(sum[:0])
	copy(d[:], sum[:])
	return d
}

// lookUpPage names a page by the block with its digest, if there is one: the
// block after that of the page before, or else the first.
func (w *worker) lookUpPage(i int) {
	page := w.frame.page(i)
	digest := w.digest(page)
	if before := w.nameBefore(i); before.Kind() == Block {
		l, block := before.Layer(), before.Number()+1
		if index := w.Layers[l].Index; index != nil {
			if d, ok := index.Digest(block); ok && d == digest && w.equals(page, l, block) {
				w.found(i, l, block)
				return
			}
		}
	}
	for _, l := range w.indexed {
		tries := 0
		for block := range w.Layers[l].Index.Blocks(digest) {
			if w.equals(page, l, block) {
				w.found(i, l, block)
				return
			}
			if tries++; tries == maxTries {
				break
			}
		}
	}
}

// row is a row of blocks that were found on neighbouring pages.
type row struct {
	last   memory.GFN // page
	name   Name       // of the last page
	length int
}

// longRow is from how many blocks on a row is expected to go on. A row that does
// not costs one BLAKE3 for nothing, one that does saves an XXH3 a page.
const longRow = 8

// found names a page by a block of an index.
func (w *worker) found(i int, l LayerID, block uint64) {
	gfn, name := w.frame.gfn+memory.GFN(i), OfBlock(l, block)
	if w.row.last+1 != gfn || w.row.name+1 != name {
		w.row.length = 0
	}
	w.row = row{gfn, name, w.row.length + 1}
	w.set(StepIndex, i, name)
}

// followRow names those of the 64 pages from at*64 on that go on with a long
// row, by their BLAKE3 alone.
func (w *worker) followRow(at int) {
	f := &w.frame
	for w.row.length >= longRow {
		i := int(w.row.last) + 1 - int(f.gfn)
		if i < at*64 || i >= at*64+64 || f.todo[at]>>(i%64)&1 == 0 {
			return
		}
		l, block := w.row.name.Layer(), w.row.name.Number()+1
		d, ok := w.Layers[l].Index.Digest(block)
		if !ok || w.digest(f.page(i)) != d || !w.equals(f.page(i), l, block) {
			w.row.length = 0
			return
		}
		w.found(i, l, block)
	}
}

// equals reports whether a block equals a page that has the digest which the
// layer's index gives for the block.
func (w *worker) equals(page []byte, l LayerID, block uint64) bool {
	switch {
	case block > maxNumber || !inside(w.Layers, OfBlock(l, block)):
		return false
	case w.Layers[l].Immutable:
		return true
	}
	got := w.blocks.ahead(l, block)
	return len(got) > 0 && bytes.Equal(page, got)
}

// blockReader reads blocks of layers, many at a time.
type blockReader struct {
	layers []Layer
	buf    []byte
	// The buffer holds n blocks of layer from first on; next is how many more
	// to read at its end.
	layer   LayerID
	first   uint64
	n, next int
	read    uint64 // bytes
	failed  uint64 // reads
}

// readBlocks is how many blocks are read at a time: 256 KiB.
const readBlocks = 64

// at returns one to n blocks from block on, or nothing when they cannot be
// read. The slice is valid until the next call.
func (r *blockReader) at(l LayerID, block uint64, n int) []byte {
	n = min(n, readBlocks)
	if left := uint64(r.layers[l].Size)/BlockSize - block; uint64(n) > left {
		n = int(left)
	}
	if r.buf == nil {
		r.buf = make([]byte, readBlocks*BlockSize)
	}
	buf := r.buf[:n*BlockSize]
	// What cannot be read is counted: a name is missed, and never wrong.
	got, _ := r.layers[l].Source.ReadAt(buf, int64(block)*BlockSize)
	r.n, r.read = 0, r.read+uint64(got)
	if got < BlockSize {
		r.failed++
		return nil
	}
	r.layer, r.first, r.n = l, block, got/BlockSize
	return buf[:r.n*BlockSize]
}

// ahead returns one block. When it continues the blocks before, more are read
// than asked for.
func (r *blockReader) ahead(l LayerID, block uint64) []byte {
	if r.n > 0 && r.layer == l && block >= r.first && block < r.first+uint64(r.n) {
		return r.buf[(block-r.first)*BlockSize:][:BlockSize]
	}
	if r.n > 0 && r.layer == l && block == r.first+uint64(r.n) {
		r.next = min(2*max(r.next, 1), readBlocks)
	} else {
		r.next = 1
	}
	if got := r.at(l, block, r.next); got != nil {
		return got[:BlockSize]
	}
	return nil
}
