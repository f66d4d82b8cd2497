package snapshot

import (
	"context"
	"fmt"

	"github.com/zeebo/xxh3"

	"ditto.vm/images/layer"
	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
)

// batchPages is what a worker stores at a time: 1 MiB, a multiple of a frame.
const batchPages = 256

// batch is a worker's copy of pages, which the guest may write meanwhile.
type batch struct {
	n       int // pages that are kept
	buf     []byte
	gfns    [batchPages]memory.GFN
	digests [batchPages]Digest
	packed  []byte  // their frames
	frames  []frame // where in packed
}

// batches cuts a set into rows of at most batchPages pages.
func batches(pages *memory.PageSet) [][]memory.Range {
	var all [][]memory.Range
	var row []memory.Range
	room := uint64(batchPages * memory.PageSize)
	for r := range pages.Runs() {
		for r.Size > 0 {
			n := min(r.Size, room)
			row = append(row, memory.Range{Start: r.Start, Size: n})
			r.Start, r.Size = r.Start+memory.GPA(n), r.Size-n
			if room -= n; room == 0 {
				all, row, room = append(all, row), nil, batchPages*memory.PageSize
			}
		}
	}
	if len(row) > 0 {
		all = append(all, row)
	}
	return all
}

// store writes the bytes of pages, as view gives them, except of those that are
// zero, that equal the parent's, or that stand there already. Where they are put
// depends on the set alone, not on the workers.
func (w *Writer) store(ctx context.Context, pages *memory.PageSet, workers int, view func(memory.GPA, uint64) ([]byte, error)) error {
	rows := batches(pages)
	total := pages.Count() * memory.PageSize
	order := newTurns()
	w.done = 0
	return parallel.Do(ctx, workers, len(rows), func(ctx context.Context, _, i int) error {
		b, ok := w.buffers.Get().(*batch)
		if !ok {
			b = &batch{buf: make([]byte, batchPages*memory.PageSize)}
		}
		defer w.buffers.Put(b)
		bytes, err := w.gather(b, rows[i], view)
		if err != nil {
			return err
		}
		if w.o.Compression == Zstd {
			err = w.writeFrames(ctx, b, order, i)
		} else {
			err = w.writePages(ctx, b, order, i)
		}
		if err == nil && w.o.Progress != nil {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.done += bytes
			w.o.Progress(w.done, total)
		}
		return err
	})
}

// gather copies the pages of a row, and keeps those to be written.
func (w *Writer) gather(b *batch, row []memory.Range, view func(memory.GPA, uint64) ([]byte, error)) (bytes uint64, err error) {
	b.n = 0
	for _, r := range row {
		src, err := view(r.Start, r.Size)
		if err != nil {
			return 0, err
		}
		bytes += r.Size
		for off := uint64(0); off < r.Size; off += memory.PageSize {
			gfn := (r.Start + memory.GPA(off)).GFN()
			page := b.buf[b.n*memory.PageSize:][:memory.PageSize]
			copy(page, src[off:])
			w.zero.Remove(gfn.GPA(), memory.PageSize)
			w.parent.Remove(gfn.GPA(), memory.PageSize)
			w.stored.Add(gfn.GPA(), memory.PageSize)
			if layer.IsZero(page) {
				w.zero.Add(gfn.GPA(), memory.PageSize)
				continue
			}
			d := pageDigest(w.seed, page)
			if w.o.Parent != nil && w.o.Parent.holds(gfn, page) {
				w.parent.Add(gfn.GPA(), memory.PageSize)
				continue
			}
			if i := w.index(gfn); w.slot[i] != 0 && w.digests[i] == d {
				continue
			}
			b.gfns[b.n], b.digests[b.n] = gfn, d
			b.n++
		}
	}
	return bytes, nil
}

// writePages writes a batch as it is: what has a place there, the rest behind
// all others.
func (w *Writer) writePages(ctx context.Context, b *batch, order *turns, turn int) error {
	err := order.take(ctx, turn, func() {
		for i := range b.n {
			page := w.index(b.gfns[i])
			w.digests[page] = b.digests[i]
			if w.slot[page] == 0 {
				w.slots++
				w.slot[page] = uint32(w.slots)
			}
		}
	})
	if err != nil {
		return err
	}
	for first := 0; first < b.n; {
		slot := w.slot[w.index(b.gfns[first])]
		n := 1
		for first+n < b.n && w.slot[w.index(b.gfns[first+n])] == slot+uint32(n) {
			n++
		}
		at := int64(slot-1) * memory.PageSize
		if _, err := w.pages.WriteAt(b.buf[first*memory.PageSize:][:n*memory.PageSize], at); err != nil {
			return fmt.Errorf("write %d pages: %w", n, err)
		}
		first += n
	}
	return nil
}

// writeFrames writes a batch as frames, behind all others.
func (w *Writer) writeFrames(ctx context.Context, b *batch, order *turns, turn int) error {
	if err := w.pack(b); err != nil {
		return err
	}
	var at uint64
	err := order.take(ctx, turn, func() {
		at = w.pagesSize
		w.pagesSize += uint64(len(b.packed))
		first := uint64(len(w.frames)) * framePages
		for _, f := range b.frames {
			f.offset += at
			w.frames = append(w.frames, f)
		}
		for i := range b.n {
			page := w.index(b.gfns[i])
			w.digests[page] = b.digests[i]
			w.slot[page] = uint32(first) + uint32(i) + 1
		}
	})
	if err != nil {
		return err
	}
	if _, err := w.pages.WriteAt(b.packed, int64(at)); err != nil {
		return fmt.Errorf("write %d compressed pages: %w", b.n, err)
	}
	return nil
}

// pack compresses a batch.
func (w *Writer) pack(b *batch) error {
	e, err := w.encoder()
	if err != nil {
		return err
	}
	defer w.encoders.Put(e)
	b.packed, b.frames = b.packed[:0], b.frames[:0]
	for first := 0; first < b.n; first += framePages {
		n := min(framePages, b.n-first)
		start := len(b.packed)
		b.packed = e.EncodeAll(b.buf[first*memory.PageSize:][:n*memory.PageSize], b.packed)
		b.frames = append(b.frames, frame{
			offset: uint64(start), size: uint32(len(b.packed) - start), pages: uint32(n), sum: xxh3.Hash(b.packed[start:]),
		})
	}
	return nil
}
