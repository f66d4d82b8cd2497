package vmm

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"math/rand/v2"
	"path/filepath"
	"sync/atomic"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/migration/live"
)

// departingDisks reads the disks of a VM that leaves: the [live.BlockSource].
type departingDisks struct {
	d      *departure
	images []live.Image
}

// Blocks implements [live.SourceVM].
func (d *departure) Blocks() live.BlockSource { return &d.disks }

// Describe implements [live.BlockSource].
func (s *departingDisks) Describe(ctx context.Context, o *live.Offer) error {
	m := s.d.m
	for i := range m.disks {
		image := m.disks[i].image
		path, err := filepath.Abs(image.Path())
		if err != nil {
			return err
		}
		d := live.Disk{Path: path, Format: string(image.Layers()[0].Format()), Size: image.Size(), ReadOnly: image.ReadOnly()}
		switch o.Storage {
		case live.StorageProven:
			d.Witness = disk.FirstWitness + 1 + rand.Int64N(1<<61) //nolint:gosec // nobody gains by guessing it
			if err := image.SetWitness(d.Witness); err != nil {
				return err
			}
		case live.StorageCopied:
			if d.Layers, err = layersOf(ctx, o, i, image); err != nil {
				return fmt.Errorf("find out what disk %d is made of: %w", i, err)
			}
		}
		o.Disks = append(o.Disks, d)
	}
	return nil
}

// layersOf says what a disk is made of, by content where nobody writes it: what
// its indexes say, or else what is read of it.
func layersOf(ctx context.Context, o *live.Offer, n int, image *chain.Chain) ([]live.DiskLayer, error) {
	known := map[int]layer.ID{}
	for _, l := range o.Layers {
		if l.Disk == n && !l.Written && l.ID.Kind() == layer.Content {
			known[l.Depth] = l.ID
		}
	}
	var all []live.DiskLayer
	for depth, l := range image.Layers() {
		path, err := filepath.Abs(l.Path())
		if err != nil {
			return nil, err
		}
		out := live.DiskLayer{Path: path, Format: string(l.Format()), Size: l.Size(), ID: known[depth]}
		if out.ID == (layer.ID{}) && (depth > 0 || image.ReadOnly()) {
			if out.ID, err = index.Identify(ctx, l); err != nil {
				return nil, fmt.Errorf("layer %s: %w", l.Path(), err)
			}
		}
		all = append(all, out)
	}
	return all, nil
}

// Arm implements [live.BlockSource].
func (s *departingDisks) Arm(images []live.Image) error {
	s.images = images
	for _, image := range images {
		d := &s.d.m.disks[image.Disk]
		if image.Depth == 0 && !d.image.ReadOnly() {
			d.writes.noted.Store(newBlockSet(d.image.Size()))
		}
	}
	return nil
}

// Disarm implements [live.BlockSource].
func (s *departingDisks) Disarm() {
	for i := range s.d.m.disks {
		s.d.m.disks[i].writes.noted.Store(nil)
	}
}

// forgetWitnesses gives back the locks that prove that disks are shared.
func (s *departingDisks) forgetWitnesses() error {
	var errs []error
	for i := range s.d.m.disks {
		errs = append(errs, s.d.m.disks[i].image.SetWitness(0))
	}
	return errors.Join(errs...)
}

func (s *departingDisks) chain(image int) *chain.Chain {
	return s.d.m.disks[s.images[image].Disk].image
}

// Extents implements [live.BlockSource].
func (s *departingDisks) Extents(ctx context.Context, image int, visit func(live.Extent) error) error {
	at := s.images[image]
	return s.chain(image).Own(ctx, int(at.Depth), int(at.Floor), func(o chain.Own) error {
		if err := s.d.ended(); err != nil {
			return err
		}
		return visit(live.Extent{Offset: o.Offset, Length: o.Length, Zeros: o.Zeros})
	})
}

// ReadBlocks implements [live.BlockSource].
func (s *departingDisks) ReadBlocks(image int, p []byte, offset int64) error {
	return s.chain(image).Layers()[s.images[image].Depth].ReadAtv([][]byte{p}, offset)
}

// CollectBlocks implements [live.BlockSource].
func (s *departingDisks) CollectBlocks(image int, visit func(offset, length int64) error) error {
	if err := s.d.ended(); err != nil {
		return err
	}
	set := s.d.m.disks[s.images[image].Disk].writes.noted.Load()
	if set == nil {
		return nil
	}
	return set.take(visit)
}

// WrittenBlocks implements [live.BlockSource].
func (s *departingDisks) WrittenBlocks() (n int64) {
	for i := range s.d.m.disks {
		if set := s.d.m.disks[i].writes.noted.Load(); set != nil {
			n += set.bytes()
		}
	}
	return n
}

// writeWatch hears of a disk's I/O: it notes what is written while the disk is
// copied, and tells whom it concerns. It implements [blk.Observer].
//
// A range is noted when the disk has it, and before the guest hears of that: who
// takes what is noted and reads it then has what was written, or finds it noted
// again.
type writeWatch struct {
	next  blk.Observer // nil for none
	noted atomic.Pointer[blockSet]
}

// BeforeRead implements [blk.Observer].
func (w *writeWatch) BeforeRead(io *blk.IO) {
	if w.next != nil {
		w.next.BeforeRead(io)
	}
}

// AfterRead implements [blk.Observer].
func (w *writeWatch) AfterRead(io *blk.IO, err error) {
	if w.next != nil {
		w.next.AfterRead(io, err)
	}
}

// BeforeWrite implements [blk.Observer].
func (w *writeWatch) BeforeWrite(io *blk.IO) {
	if w.next != nil {
		w.next.BeforeWrite(io)
	}
}

// AfterWrite implements [blk.Observer].
func (w *writeWatch) AfterWrite(io *blk.IO, err error) {
	if set := w.noted.Load(); set != nil {
		n := int64(0)
		for _, b := range io.Buffers {
			n += int64(len(b.Data))
		}
		set.add(io.Offset, n)
	}
	if w.next != nil {
		w.next.AfterWrite(io, err)
	}
}

// BeforeErase implements [blk.Observer].
func (w *writeWatch) BeforeErase(offset, n int64) {
	if w.next != nil {
		w.next.BeforeErase(offset, n)
	}
}

// AfterErase implements [blk.Observer].
func (w *writeWatch) AfterErase(offset, n int64, err error) {
	if set := w.noted.Load(); set != nil {
		set.add(offset, n)
	}
	if w.next != nil {
		w.next.AfterErase(offset, n, err)
	}
}

// Resize implements [blk.Observer]. A disk that is copied keeps its size.
func (w *writeWatch) Resize(size int64) {
	if w.next != nil {
		w.next.Resize(size)
	}
}

// noteSize is how finely writes are noted, in bytes: a cluster of most images.
const noteSize = 64 << 10

// blockSet is what was written of a disk. It may be added to from any goroutine.
type blockSet struct {
	size  int64 // of the disk
	words []atomic.Uint64
}

func newBlockSet(size int64) *blockSet {
	return &blockSet{size: size, words: make([]atomic.Uint64, (size+64*noteSize-1)/(64*noteSize))}
}

// add notes a range. What is behind the end of the disk was not written.
func (s *blockSet) add(offset, n int64) {
	for at := offset / noteSize; at*noteSize < min(offset+n, s.size); at++ {
		s.words[at/64].Or(1 << (at % 64))
	}
}

// take calls visit with what is noted, in ascending order, and forgets it before.
func (s *blockSet) take(visit func(offset, length int64) error) error {
	for i := range s.words {
		word := s.words[i].Swap(0)
		for word != 0 {
			first := bits.TrailingZeros64(word)
			n := bits.TrailingZeros64(^(word >> first))
			offset := (int64(i)*64 + int64(first)) * noteSize
			if err := visit(offset, min(int64(n)*noteSize, s.size-offset)); err != nil {
				return err
			}
			word &^= (1<<n - 1) << first
		}
	}
	return nil
}

// bytes is how much is noted.
func (s *blockSet) bytes() (n int64) {
	for i := range s.words {
		n += int64(bits.OnesCount64(s.words[i].Load())) * noteSize
	}
	return n
}
