package index

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"iter"
	"math/rand/v2"
	"os"
	"sort"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

// Beside returns where the index of the layer at path lies: [Build] is told to
// put it there, and machines look for it there.
func Beside(path string) string { return path + ".dittoindex" }

// ErrStale is wrapped by [Index.Check] when the layer is not the one that was
// indexed. The cure is to build the index anew.
var ErrStale = errors.New("the index is stale")

// Index is an open index. Its methods may be called from any goroutine until
// Close.
type Index struct {
	h      *header
	data   []byte
	mapped bool

	digests, runs, fanout, order, filter []byte
}

// Open maps the index at path and checks all of it, at the speed of memory once
// the file is in the page cache.
func Open(path string) (*Index, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("index: %w", err)
	}
	if !info.Mode().IsRegular() || info.Size() < headerSize {
		return nil, fmt.Errorf("index %s: %w", path, formatError("%d bytes are too few", info.Size()))
	}
	data, err := unix.Mmap(int(f.Fd()), 0, int(info.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("index %s: map: %w", path, err)
	}
	x, err := parse(data)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("index %s: %w", path, err), unix.Munmap(data))
	}
	x.mapped = true
	return x, nil
}

// parse checks the bytes of an index. Nothing in them can make a later look-up
// read outside: what would is an error here.
func parse(data []byte) (*Index, error) {
	h, err := decodeHeader(data, uint64(len(data)))
	if err != nil {
		return nil, err
	}
	if sum := xxh3.Hash128(data[headerSize:]).Bytes(); sum != h.bodySum {
		return nil, formatError("its content was altered")
	}
	x := &Index{
		h: h, data: data,
		digests: data[h.digests:][:16*h.entries],
		runs:    data[h.runTable:][:8*h.runs],
		fanout:  data[h.fanout:][:4*(1<<h.fanoutBits+1)],
		order:   data[h.order:][:4*h.entries],
		filter:  data[h.filter:][:filterRowSize*uint64(h.filterRows)],
	}
	if err := x.checkTables(); err != nil {
		return nil, err
	}
	return x, nil
}

// checkTables checks that runs cover the entries with ascending blocks inside
// the layer, that the fanout ascends, and that order names entries.
func (x *Index) checkTables() error {
	blocks := uint64(x.h.layerSize) / layer.BlockSize
	nextBlock, nextEntry := uint64(0), uint64(0)
	for i := range x.h.runs {
		block, entry := x.run(i)
		end := x.runEnd(i)
		switch {
		case entry != nextEntry || end <= entry:
			return formatError("run %d begins with entry %d", i, entry)
		case block < nextBlock || block+end-entry > blocks:
			return formatError("run %d begins with block %d", i, block)
		}
		// A gap of none would be one run.
		nextBlock, nextEntry = block+end-entry+1, end
	}
	last := uint32(0)
	for i := 0; i < len(x.fanout); i += 4 {
		v := binary.LittleEndian.Uint32(x.fanout[i:])
		if v < last || uint64(v) > x.h.entries {
			return formatError("fanout %d is %d after %d", i/4, v, last)
		}
		last = v
	}
	if binary.LittleEndian.Uint32(x.fanout) != 0 || uint64(last) != x.h.entries {
		return formatError("fanout ends at %d of %d entries", last, x.h.entries)
	}
	for i := 0; i < len(x.order); i += 4 {
		if v := binary.LittleEndian.Uint32(x.order[i:]); uint64(v) >= x.h.entries {
			return formatError("position %d names entry %d of %d", i/4, v, x.h.entries)
		}
	}
	return nil
}

// Close unmaps the index.
func (x *Index) Close() error {
	if !x.mapped {
		return nil
	}
	x.mapped = false
	return unix.Munmap(x.data)
}

// LayerID returns the identity by content of the indexed layer.
func (x *Index) LayerID() layer.ID { return x.h.layerID }

// LayerSize returns the layer's size in bytes.
func (x *Index) LayerSize() int64 { return x.h.layerSize }

// Entries returns the number of blocks that are not zero.
func (x *Index) Entries() uint64 { return x.h.entries }

// FileSize returns the size of the index in bytes.
func (x *Index) FileSize() int64 { return int64(len(x.data)) }

// MayHold reports whether the layer may hold a block with this XXH3-64: false
// is certain, and cheap to find.
func (x *Index) MayHold(xxh3Hash uint64) bool {
	return filterHas(x.filter, x.h.filterRows, xxh3Hash)
}

// Block returns the first block with the digest, and whether there is one.
func (x *Index) Block(d layer.Digest) (block uint64, ok bool) {
	for block := range x.Blocks(d) {
		return block, true
	}
	return 0, false
}

// Blocks yields all blocks with the digest, in ascending order.
func (x *Index) Blocks(d layer.Digest) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		lo, hi := x.bucket(&d)
		n := sort.Search(hi-lo, func(i int) bool { return compare(x.digest(x.ordered(lo+i)), &d) >= 0 })
		for i := lo + n; i < hi; i++ {
			entry := x.ordered(i)
			if *x.digest(entry) != d || !yield(x.blockOf(entry)) {
				return
			}
		}
	}
}

// Digest returns the digest of a block. Blocks of zeros have none, nor have
// those outside the layer.
func (x *Index) Digest(block uint64) (d layer.Digest, ok bool) {
	i := uint64(sort.Search(int(x.h.runs), func(i int) bool { b, _ := x.run(uint64(i)); return b > block }))
	if i == 0 || block >= uint64(x.h.layerSize)/layer.BlockSize {
		return d, false
	}
	first, entry := x.run(i - 1)
	if entry += block - first; entry >= x.runEnd(i-1) {
		return d, false
	}
	return *x.digest(uint32(entry)), true
}

// bucket returns the positions of the digests that share d's prefix.
func (x *Index) bucket(d *layer.Digest) (lo, hi int) {
	p := prefix(d, x.h.fanoutBits)
	return int(binary.LittleEndian.Uint32(x.fanout[4*p:])), int(binary.LittleEndian.Uint32(x.fanout[4*p+4:]))
}

// ordered returns the entry at a position in the order of digests.
func (x *Index) ordered(i int) uint32 { return binary.LittleEndian.Uint32(x.order[4*i:]) }

func (x *Index) digest(entry uint32) *layer.Digest {
	return (*layer.Digest)(x.digests[16*uint64(entry):][:16])
}

// blockOf returns the block of an entry.
func (x *Index) blockOf(entry uint32) uint64 {
	i := sort.Search(int(x.h.runs), func(i int) bool { _, e := x.run(uint64(i)); return e > uint64(entry) })
	block, first := x.run(uint64(i - 1))
	return block + uint64(entry) - first
}

// run returns first block and first entry of a run.
func (x *Index) run(i uint64) (block, entry uint64) {
	b := x.runs[8*i:]
	return uint64(binary.LittleEndian.Uint32(b)), uint64(binary.LittleEndian.Uint32(b[4:]))
}

// runEnd returns the entry after a run's last.
func (x *Index) runEnd(i uint64) uint64 {
	if i+1 == x.h.runs {
		return x.h.entries
	}
	_, end := x.run(i + 1)
	return end
}

// Check compares the index with the layer as it is now: size, stamp, and the
// content of so many blocks chosen at random. Errors wrap [ErrStale] when they
// differ.
func (x *Index) Check(src Source, samples int) error {
	stamp, err := src.Stamp()
	if err != nil {
		return fmt.Errorf("check the index: %w", err)
	}
	if src.Size() != x.h.layerSize {
		return fmt.Errorf("%w: the layer has %d bytes and had %d", ErrStale, src.Size(), x.h.layerSize)
	}
	if d := x.h.stamp.Difference(stamp); d != "" {
		return fmt.Errorf("%w: the layer changed since it was indexed: %s", ErrStale, d)
	}
	blocks := uint64(x.h.layerSize) / layer.BlockSize
	for range samples {
		if blocks == 0 {
			break
		}
		// Every other sample is a block with an entry: layers are sparse.
		block := rand.Uint64N(blocks)
		if x.h.entries > 0 && rand.IntN(2) == 0 {
			block = x.blockOf(uint32(rand.Uint64N(x.h.entries)))
		}
		if err := x.checkBlock(src, block); err != nil {
			return err
		}
	}
	return nil
}

// checkBlock compares one block with its entry.
func (x *Index) checkBlock(src io.ReaderAt, block uint64) error {
	var b [layer.BlockSize]byte
	if _, err := src.ReadAt(b[:], int64(block)*layer.BlockSize); err != nil {
		return fmt.Errorf("check the index: read block %d: %w", block, err)
	}
	want, ok := x.Digest(block)
	if ok && (layer.IsZero(b[:]) || layer.Sum(b[:]) != want) || !ok && !layer.IsZero(b[:]) {
		return fmt.Errorf("%w: block %d of the layer is not what was indexed, though its stamp is", ErrStale, block)
	}
	return nil
}

// compare orders digests.
func compare(a, b *layer.Digest) int {
	for _, off := range []int{0, 8} {
		x, y := binary.BigEndian.Uint64(a[off:]), binary.BigEndian.Uint64(b[off:])
		if x != y {
			if x < y {
				return -1
			}
			return 1
		}
	}
	return 0
}
