package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"

	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
)

// pageMap makes the page map of what was captured.
func (w *Writer) pageMap(ctx context.Context) (*pageMap, error) {
	runs, err := w.runs(ctx)
	if err == nil {
		runs, err = w.lowered(ctx, runs)
	}
	if err != nil {
		return nil, err
	}
	p := &pageMap{runs: runs, seed: w.seed}
	w.place(p)
	p.slots = uint64(len(p.digests))
	if err := p.markSlots(); err != nil {
		return nil, err
	}
	p.index()
	p.blockDigests = make([]Digest, len(p.blocks))
	const row = 256
	err = parallel.Do(ctx, w.o.Workers, (len(p.blocks)+row-1)/row, func(_ context.Context, _, n int) error {
		buf := make([]byte, maxBlockRun*memory.PageSize)
		for i := n * row; i < min((n+1)*row, len(p.blocks)); i++ {
			d, err := w.blockDigest(&p.runs[p.blocks[i]], buf)
			if err != nil {
				return err
			}
			p.blockDigests[i] = d
		}
		return nil
	})
	return p, err
}

// lowered lets runs of blocks name the layers that hold them.
func (w *Writer) lowered(ctx context.Context, runs []Run) ([]Run, error) {
	l := runList{regions: w.regions}
	for _, r := range runs {
		for r.Kind == Block && w.o.Layers[r.Layer].Lower != nil && r.Pages > 0 {
			in, n, err := w.o.Layers[r.Layer].Lower(r.Number, r.Pages)
			if err == nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				return nil, fmt.Errorf("layer %s: who holds block %d: %w", w.o.Layers[r.Layer].Path, r.Number, err)
			}
			n = min(max(n, 1), r.Pages)
			part := r.cut(r.Start, r.Start+memory.GFN(n))
			if i, ok := w.byNames[in]; ok && w.inLayer(i, r.Number, n) {
				part.Layer = i
			}
			l.add(part)
			if n == r.Pages {
				r.Pages = 0
				break
			}
			r = r.cut(r.Start+memory.GFN(n), r.End())
		}
		if r.Pages > 0 {
			l.add(r)
		}
	}
	return l.runs, nil
}

// blockDigest returns the digest of a run of blocks: over those that the layer's
// index has of them all, which costs no reading, or else over their bytes, for
// which buf has room.
func (w *Writer) blockDigest(r *Run, buf []byte) (Digest, error) {
	l := &w.o.Layers[r.Layer]
	flat := make([]byte, 0, maxBlockRun*digestSize)
	for block := r.Number; l.Digest != nil && block < r.Number+r.Pages; block++ {
		d, ok := l.Digest(block)
		if !ok {
			break
		}
		flat = append(flat, d[:]...)
	}
	if r.Indexed = len(flat) == int(r.Pages)*digestSize; r.Indexed {
		return pageDigest(w.seed, flat), nil
	}
	b := buf[:r.Pages*memory.PageSize]
	if err := readFull(l.Source, b, int64(r.Number)*memory.PageSize); err != nil {
		return Digest{}, fmt.Errorf("layer %s: read %d blocks from %d on: %w", l.Path, r.Pages, r.Number, err)
	}
	return blocksDigest(w.seed, b, false), nil
}

// blocksDigest returns the digest of a run whose blocks were read.
func blocksDigest(seed uint64, blocks []byte, indexed bool) Digest {
	if !indexed {
		return pageDigest(seed, blocks)
	}
	flat := make([]byte, 0, maxBlockRun*digestSize)
	for ; len(blocks) > 0; blocks = blocks[memory.PageSize:] {
		d := layer.Sum(blocks[:memory.PageSize])
		flat = append(flat, d[:]...)
	}
	return pageDigest(seed, flat)
}

// readFull fills b. Sources return io.EOF together with the last bytes.
func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// place fills in digests and frames, without what no page needs any more.
func (w *Writer) place(p *pageMap) {
	if w.o.Compression == Zstd {
		w.placeFrames(p)
		return
	}
	live := uint64(0)
	for _, r := range p.runs {
		if r.Kind == Unique {
			live = max(live, r.Number+r.Pages)
		}
	}
	p.digests = make([]Digest, live)
	w.fillDigests(p)
	p.pagesSize = live * memory.PageSize
}

// fillDigests sets the digests of the slots in use.
func (w *Writer) fillDigests(p *pageMap) {
	for _, r := range p.runs {
		if r.Kind == Unique {
			copy(p.digests[r.Number:], w.digests[w.index(r.Start):][:r.Pages])
		}
	}
}

// placeFrames leaves out frames that hold no page any more, and numbers slots
// anew.
func (w *Writer) placeFrames(p *pageMap) {
	p.framePages = framePages
	live := make([]bool, len(w.frames))
	for _, r := range p.runs {
		if r.Kind == Unique {
			for f := r.Number / framePages; f <= (r.Number+r.Pages-1)/framePages; f++ {
				live[f] = true
			}
		}
	}
	moved := make([]uint64, len(w.frames)) // the new number of a frame
	for i, f := range w.frames {
		if live[i] {
			moved[i] = uint64(len(p.frames))
			p.frames = append(p.frames, f)
			p.pagesSize = f.offset + uint64(f.size)
		}
	}
	l := runList{regions: w.regions}
	for _, r := range p.runs {
		if r.Kind != Unique {
			l.add(r)
			continue
		}
		for r.Pages > 0 { // frames of one run may drift apart
			n := min(r.Pages, framePages-r.Number%framePages)
			part := r.cut(r.Start, r.Start+memory.GFN(n))
			part.Number = moved[part.Number/framePages]*framePages + part.Number%framePages
			l.add(part)
			r = r.cut(r.Start+memory.GFN(n), r.End())
		}
	}
	p.runs = l.runs
	p.digests = make([]Digest, len(p.frames)*framePages)
	w.fillDigests(p)
}

// trim gives back what of pages belongs to no page any more: it reads as zeros.
func (w *Writer) trim(p *pageMap) error {
	if err := w.pages.Truncate(int64(p.pagesSize)); err != nil {
		return err
	}
	for at, size := range p.gaps() {
		err := unix.Fallocate(int(w.pages.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(at), int64(size))
		if errors.Is(err, unix.EOPNOTSUPP) {
			err = w.wipe(int64(at), int64(size))
		}
		if err != nil {
			return fmt.Errorf("free %d bytes of pages: %w", size, err)
		}
	}
	return nil
}

// wipe writes zeros where the file system knows no holes.
func (w *Writer) wipe(at, size int64) error {
	zeros := make([]byte, min(size, 1<<20))
	for size > 0 {
		n, err := w.pages.WriteAt(zeros[:min(size, int64(len(zeros)))], at)
		if err != nil {
			return err
		}
		at, size = at+int64(n), size-int64(n)
	}
	return nil
}

// gaps yields the ranges of pages that belong to no page: offset and size.
func (p *pageMap) gaps() func(yield func(at, size uint64) bool) {
	return func(yield func(at, size uint64) bool) {
		end := uint64(0) // of what is used
		for _, f := range p.frames {
			if f.offset > end && !yield(end, f.offset-end) {
				return
			}
			end = f.offset + uint64(f.size)
		}
		if p.compressed() {
			return
		}
		for slot := range p.slots {
			if !p.isUsed(slot) {
				continue
			}
			at := slot * memory.PageSize
			if at > end && !yield(end, at-end) {
				return
			}
			end = at + memory.PageSize
		}
	}
}
