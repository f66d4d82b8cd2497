package names

import "ditto.vm/memory"

// The hooks below surround every request of a disk. What a page goes through:
//
//	              BeginRead                       EndRead: done, alone
//	nothing, --------------------> reading(block) -----------------------> named
//	named                             |    |
//	   |                              |    | EndRead: failed
//	   |          anything that       |    v
//	   |          overlaps            |  nothing <---------------------------+
//	   |                              v                 last End             |
//	   |          BeginWrite        busy (tainted) ---------------------------
//	   +-----------------> writing(block) --- EndWrite: done, alone ---> named
//
// "Overlaps" means, at any time between Begin and End, even if it began and ended
// in between:
//
//   - another read or write of the page: whichever comes second finds the first
//     one's word, and makes the page busy for both;
//   - a write or erasure of the block: it drops the block's chain, in which the
//     reading or writing page stands;
//   - a change of the page by the VMM: a write, a discard. A read reports its own
//     transfer once, which is what the two bits of reading count.
//
// A page that I/O only touches in part is busy from the start, and so is one that
// stands twice in a request, since it meets itself.
//
// Why no name of a block outlives a change of the block. A change is noted
// before the block's chain is dropped, and whoever puts a page into the chain
// looks for changes after. Of the two that run at once at least one sees the
// other: either the change drops the page, or the page sees the change and
// becomes busy. When the chain has been dropped and the change still goes on,
// everybody sees it. So there is no name, and nobody who could make one, from
// before the first byte of the block changes until after the last.
//
// Why no name of a page outlives I/O into it. The name is dropped by BeginRead,
// and while the page is reading or busy nothing can be recorded for it. So the
// [Prover] never looks at a page that a device writes to, and a page that was
// pinned before it was armed gets its name after the device is done with it.

// BeginRead says that blocks of a layer, from offset on, are about to be read
// into memory, in this order. Every Begin is followed by the End with the same
// arguments.
func (t *Table) BeginRead(l LayerID, offset int64, mem []memory.Range) {
	s := t.enter(l, offset, mem, kindReading)
	t.mindChanges(s, offset, mem, 0)
}

// EndRead says that the I/O is over, that memory was reported as written
// ([memory.Space.Wrote]), and whether all of it was done.
func (t *Table) EndRead(l LayerID, offset int64, mem []memory.Range, done bool) {
	t.leave(l, offset, mem, kindReading, done)
}

// BeginWrite says that memory is about to be written to blocks of a layer.
func (t *Table) BeginWrite(l LayerID, offset int64, mem []memory.Range) {
	s := spanOf(l, offset, total(mem))
	t.changes.begin(s)
	add(&t.stats.droppedWrite, t.spoil(s))
	s = t.enter(l, offset, mem, kindWriting)
	t.mindChanges(s, offset, mem, 1)
}

// EndWrite says that the I/O is over, and whether all of it was done.
func (t *Table) EndWrite(l LayerID, offset int64, mem []memory.Range, done bool) {
	t.changes.end(spanOf(l, offset, total(mem)))
	t.leave(l, offset, mem, kindWriting, done)
}

// BeginErase says that blocks of a layer are about to be discarded or zeroed.
func (t *Table) BeginErase(l LayerID, offset, n int64) {
	s := spanOf(l, offset, n)
	t.changes.begin(s)
	add(&t.stats.droppedErase, t.spoil(s))
}

// EndErase says that it is over, however it went.
func (t *Table) EndErase(l LayerID, offset, n int64) { t.changes.end(spanOf(l, offset, n)) }

// total is the size of the memory in bytes.
func total(mem []memory.Range) int64 {
	n := int64(0)
	for _, m := range mem {
		n += int64(m.Size)
	}
	return n
}

// spanOf returns the blocks that [offset, offset+n) touches, n not 0.
func spanOf(l LayerID, offset, n int64) span {
	return span{layer: l, first: uint64(offset) / BlockSize, last: uint64(offset+n-1) / BlockSize}
}

// eachPair calls f for every page that mem touches, in order, with the block
// that it is read from or written to. whole is false unless all of the page is
// all of the block.
func (t *Table) eachPair(offset int64, mem []memory.Range, f func(page uint32, block uint64, whole bool)) {
	for _, m := range mem {
		aligned := (uint64(offset)^uint64(m.Start))%BlockSize == 0
		for at := m.Start &^ (BlockSize - 1); at < m.End(); at += BlockSize {
			page, ok := t.page(at)
			if !ok {
				continue
			}
			whole := aligned && at >= m.Start && at+BlockSize <= m.End()
			f(page, uint64(offset+int64(at-m.Start))/BlockSize, whole)
		}
		offset += int64(m.Size)
	}
}

// enter makes the pages of a request reading or writing, or busy where they
// cannot be recorded. Pages that a write takes in part stay as they are. It
// returns the blocks of the request.
func (t *Table) enter(l LayerID, offset int64, mem []memory.Range, kind word) span {
	dropped := uint64(0)
	t.eachPair(offset, mem, func(page uint32, block uint64, whole bool) {
		if !whole && kind == kindWriting {
			return
		}
		was, clean := t.occupy(page, kind, whole)
		if was == kindNamed {
			dropped++
		}
		if clean {
			busy := kindBusy | inFlightOf(kind)
			if !t.join(page, busy, kind|word(makeKey(l, block))) {
				t.taint(page, busy)
			}
		}
	})
	add(&t.stats.droppedIO, dropped)
	return spanOf(l, offset, max(total(mem), 1))
}

// inFlightOf is what a read or write counts in a busy word.
func inFlightOf(kind word) word {
	if kind == kindWriting {
		return oneWrite
	}
	return oneRead
}

// occupy makes a page busy with one more read or write. It returns what kind
// the page was, and whether the page is busy with this alone and may be named by
// it.
func (t *Table) occupy(page uint32, kind word, whole bool) (was word, clean bool) {
	for {
		w := t.load(page)
		now := w.spoilt() + inFlightOf(kind)
		if w == 0 || w.kind() == kindNamed {
			now = kindBusy | inFlightOf(kind)
			if !whole {
				now |= taintedBit
			}
		}
		ok := false
		if w.chained() {
			ok = t.leaveChain(page, w, func(word) (word, bool) { return now, true })
		} else {
			ok = t.swap(page, w, now)
		}
		if ok {
			return w.kind(), now&taintedBit == 0
		}
	}
}

// taint forbids to record a page that is in flight with the word was.
func (t *Table) taint(page uint32, was word) {
	for {
		w := t.load(page)
		switch {
		case w.kind() == kindBusy:
			if t.swap(page, w, w|taintedBit) {
				return
			}
		case w.chained() && w.kind() == was.kind() && w.key() == was.key():
			if t.leaveChain(page, w, func(w word) (word, bool) { return w.spoilt(), true }) {
				return
			}
		default:
			return
		}
	}
}

// mindChanges taints the pages of a request whose blocks are being changed by
// others, or lie outside the layer. own is how many changes the request noted
// itself.
func (t *Table) mindChanges(s span, offset int64, mem []memory.Range, own int) {
	kind := kindReading
	if own > 0 {
		kind = kindWriting
	}
	blocks := uint64(0)
	if layer := t.layer(s.layer); layer != nil {
		blocks = layer.blocks.Load()
	}
	if s.last < blocks && !t.changes.others(s, own) {
		return
	}
	t.eachPair(offset, mem, func(page uint32, block uint64, whole bool) {
		if !whole {
			return
		}
		if block >= blocks || t.changes.others(span{s.layer, block, block}, own) {
			t.taint(page, kind|word(makeKey(s.layer, block)))
		}
	})
}

// leave takes a request's pages out of flight, and names those that were alone.
func (t *Table) leave(l LayerID, offset int64, mem []memory.Range, kind word, done bool) {
	var recorded, missed uint64
	t.eachPair(offset, mem, func(page uint32, block uint64, whole bool) {
		switch {
		case !whole && kind == kindWriting:
		case t.depart(page, kind, makeKey(l, block), done):
			recorded++
		case whole:
			missed++
		}
	})
	add(&t.stats.recorded, recorded)
	add(&t.stats.missed, missed)
}

// depart takes one page out of flight and reports whether it is named now.
func (t *Table) depart(page uint32, kind word, k key, done bool) bool {
	for {
		w := t.load(page)
		switch {
		case w.kind() == kind && w.key() == k && done:
			if t.swap(page, w, kindNamed|word(k)) {
				return true
			}
		case w.kind() == kind && w.key() == k:
			if t.leaveChain(page, w, func(word) (word, bool) { return 0, true }) {
				return false
			}
		case w.kind() == kindBusy && w&inFlight != 0:
			now := w - inFlightOf(kind)
			if now&inFlight == 0 {
				now = 0
			}
			if t.swap(page, w, now) {
				return false
			}
		default:
			return false // an End without its Begin
		}
	}
}
