package snapshot

import (
	"fmt"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
)

// Reader reads pages, for one goroutine. It keeps the frame and the run of
// blocks that it read last, since neighbours are wanted next.
type Reader struct {
	s *Snapshot

	decoder *zstd.Decoder
	packed  []byte
	frame   cached
	blocks  cached
}

// cached holds the pages of a frame, or of a run of blocks.
type cached struct {
	src *Snapshot
	i   int
	buf []byte
}

// NewReader returns a reader of the snapshot's memory.
func (s *Snapshot) NewReader() *Reader { return &Reader{s: s} }

// Close gives back what the reader holds.
func (r *Reader) Close() {
	if r.decoder != nil {
		r.decoder.Close()
	}
}

// ReadPage fills dst, a page long, with what a page of guest memory held. The
// bytes are proven.
func (r *Reader) ReadPage(gfn memory.GFN, dst []byte) error {
	f, ok := r.s.resolve(gfn)
	if !ok || len(dst) != memory.PageSize {
		return fmt.Errorf("read %d bytes of page %s: %w", len(dst), gfn, memory.ErrOutOfRange)
	}
	if err := r.read(f, dst); err != nil {
		return fmt.Errorf("read page %s: %w", gfn, err)
	}
	return nil
}

// read fills dst with the pages of a run.
func (r *Reader) read(f flatRun, dst []byte) error {
	switch f.Kind {
	case Zero:
		clear(dst)
		return nil
	case Block:
		return r.readBlock(f, dst)
	case Unique:
		if f.src.p.compressed() {
			return r.readFrames(f, dst)
		}
		return f.src.readPages(f.Run, dst)
	}
	// Page runs and what they refer to need not be in the same order.
	for i := range memory.GFN(f.Pages) {
		other, ok := f.src.resolve(memory.GFN(f.Number) + i)
		if !ok {
			return formatError("page %s refers to %s", f.Start+i, memory.GFN(f.Number)+i)
		}
		if err := r.read(other, dst[i*memory.PageSize:][:memory.PageSize]); err != nil {
			return err
		}
	}
	return nil
}

// readPages fills dst with pages that are stored as they are.
func (s *Snapshot) readPages(r Run, dst []byte) error {
	if err := readFull(s.pages, dst, int64(r.Number)*memory.PageSize); err != nil {
		return fmt.Errorf("snapshot %s: %s: %w", s.dir, PagesName, err)
	}
	for i := range r.Pages {
		if err := s.checkSlot(r.Number+i, dst[i*memory.PageSize:][:memory.PageSize]); err != nil {
			return err
		}
	}
	return nil
}

// checkSlot checks that a page is what was stored.
func (s *Snapshot) checkSlot(slot uint64, page []byte) error {
	want, err := s.p.slotDigest(slot)
	if err != nil {
		return fmt.Errorf("snapshot %s: %w", s.dir, err)
	}
	if pageDigest(s.p.seed, page) != want {
		return s.altered(slot)
	}
	return nil
}

func (s *Snapshot) altered(slot uint64) error {
	return fmt.Errorf("snapshot %s: %w", s.dir, formatError("%s: slot %d was altered", PagesName, slot))
}

// readFrames fills dst with pages that are compressed.
func (r *Reader) readFrames(f flatRun, dst []byte) error {
	p := f.src.p
	for slot := f.Number; slot < f.Number+f.Pages; slot++ {
		n := int(slot / uint64(p.framePages))
		if r.frame.src != f.src || r.frame.i != n {
			r.frame.src = nil
			if err := r.unpack(f.src, n); err != nil {
				return err
			}
			r.frame.src, r.frame.i = f.src, n
		}
		page := r.frame.buf[slot%uint64(p.framePages)*memory.PageSize:][:memory.PageSize]
		if err := f.src.checkSlot(slot, page); err != nil {
			return err
		}
		dst = dst[copy(dst, page):]
	}
	return nil
}

// unpack decompresses a frame.
func (r *Reader) unpack(s *Snapshot, n int) error {
	if r.decoder == nil {
		var err error
		r.decoder, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(maxFramePages*memory.PageSize), zstd.WithDecodeAllCapLimit(true))
		if err != nil {
			return err
		}
		r.frame.buf = make([]byte, 0, maxFramePages*memory.PageSize)
	}
	f := s.p.frames[n]
	if cap(r.packed) < int(f.size) {
		r.packed = make([]byte, maxFramePages*memory.PageSize+frameSlack)
	}
	packed := r.packed[:f.size]
	if err := readFull(s.pages, packed, int64(f.offset)); err != nil {
		return fmt.Errorf("snapshot %s: %s: %w", s.dir, PagesName, err)
	}
	bad := func(why any) error {
		return fmt.Errorf("snapshot %s: %w", s.dir, formatError("%s: frame %d: %v", PagesName, n, why))
	}
	if xxh3.Hash(packed) != f.sum {
		return bad("it was altered")
	}
	var err error
	if r.frame.buf, err = r.decoder.DecodeAll(packed, r.frame.buf[:0]); err != nil {
		return bad(err)
	}
	if len(r.frame.buf) != int(f.pages)*memory.PageSize {
		return bad(fmt.Sprintf("%d bytes of %d pages", len(r.frame.buf), f.pages))
	}
	return nil
}

// readBlock fills dst with blocks of a layer. Unless the layers are known to be
// what they were, all blocks of the run are read to prove it.
func (r *Reader) readBlock(f flatRun, dst []byte) error {
	run := f.src.p.runs[f.i]
	if run.Pages == f.Pages {
		return f.src.readBlocks(f.i, dst)
	}
	if f.src.isProven() {
		file, err := f.src.layer(f.Layer)
		if err != nil {
			return err
		}
		return readFull(file, dst, int64(f.Number)*memory.PageSize)
	}
	if r.blocks.src != f.src || r.blocks.i != f.i {
		if r.blocks.buf == nil {
			r.blocks.buf = make([]byte, maxBlockRun*memory.PageSize)
		}
		r.blocks.src = nil
		if err := f.src.readBlocks(f.i, r.blocks.buf); err != nil {
			return err
		}
		r.blocks.src, r.blocks.i = f.src, f.i
	}
	copy(dst, r.blocks.buf[(f.Number-run.Number)*memory.PageSize:])
	return nil
}
