package names

import "ditto.vm/memory"

// Record names a page provisionally, for bytes that reached it by other ways
// than the hooks see: a loaded kernel, an index. Only blocks can be recorded. It
// returns false when I/O has the page or changes the block, when the layer has no
// such block, and when the chain of the block is full.
func (t *Table) Record(gpa memory.GPA, n Name) bool {
	page, ok := t.page(gpa)
	if !ok || n.Kind() != Block || gpa%memory.PageSize != 0 || n.Number() >= mostBlocks {
		return false
	}
	if w := t.load(page); w != 0 && w.kind() != kindNamed {
		return false
	}
	// A write to the block that takes no time, and changes nothing.
	mem := [1]memory.Range{{Start: gpa, Size: BlockSize}}
	offset := int64(n.Number()) * BlockSize
	s := t.enter(n.Layer(), offset, mem[:], kindWriting)
	t.mindRecord(s, page)
	if !t.depart(page, kindWriting, makeKey(n.Layer(), n.Number()), true) {
		return false
	}
	t.stats.recorded.Add(1)
	return true
}

// mindRecord taints the page when its block is being changed or is not there.
func (t *Table) mindRecord(s span, page uint32) {
	layer := t.layer(s.layer)
	if layer == nil || s.last >= layer.blocks.Load() || t.changes.others(s, 0) {
		t.taint(page, kindWriting|word(makeKey(s.layer, s.first)))
	}
}

// HostWrite says that the VMM changed memory, or gave it back to the host.
// Names die, and I/O in flight on the pages records nothing; except that a read
// may report its own transfer, once.
func (t *Table) HostWrite(gpa memory.GPA, n uint64) {
	dropped := uint64(0)
	t.eachPage(memory.Range{Start: gpa, Size: n}, func(page uint32, w word) {
		if t.moved(page, w) {
			dropped++
		}
	})
	add(&t.stats.droppedHost, dropped)
}

// moved notes that the VMM changed a page, and reports whether a name died.
func (t *Table) moved(page uint32, w word) bool {
	for ; w != 0; w = t.load(page) {
		if w.kind() == kindReading && w&reportMask == 0 {
			if t.swap(page, w, w+reportUnit) {
				return false
			}
			continue
		}
		if t.dropPage(page, w) {
			return w.kind() == kindNamed
		}
	}
	return false
}

// Drop says that the pages which r touches may hold anything.
func (t *Table) Drop(r memory.Range) {
	dropped := uint64(0)
	t.eachPage(r, func(page uint32, w word) {
		for ; w != 0 && !t.dropPage(page, w); w = t.load(page) {
		}
		if w.kind() == kindNamed {
			dropped++
		}
	})
	add(&t.stats.droppedHost, dropped)
}

// dropPage drops the name of a page whose word was w, or lets its I/O record
// nothing. It returns false when the word is another.
func (t *Table) dropPage(page uint32, w word) bool {
	if w.chained() {
		return t.leaveChain(page, w, func(w word) (word, bool) { return w.spoilt(), true })
	}
	return t.swap(page, w, w.spoilt())
}

// DropBlocks says that n bytes of a layer, from offset on, may have changed.
// Changes that take time are surrounded by [Table.BeginErase] and
// [Table.EndErase].
func (t *Table) DropBlocks(l LayerID, offset, n int64) {
	if n > 0 {
		add(&t.stats.droppedErase, t.spoil(spanOf(l, offset, n)))
	}
}

// DropBeyond says that a layer has size bytes from now on. Call it before it is
// cut short, and after it has grown.
func (t *Table) DropBeyond(l LayerID, size int64) {
	layer := t.layer(l)
	if layer == nil {
		return
	}
	blocks := min(uint64(max(size, 0))/BlockSize, mostBlocks)
	layer.blocks.Store(blocks)
	add(&t.stats.droppedResize, t.spoilAll(span{layer: l, first: blocks, last: mostBlocks}))
}
