package index

import (
	"encoding/binary"
	"fmt"
	"runtime"
	"slices"
	"sync"

	"github.com/zeebo/xxh3"

	"ditto.vm/images/layer"
)

// tables collects the entries of an index in block order: 24 bytes for each
// block that is not zero, until they are written.
type tables struct {
	size    int64
	content *layer.ContentHasher
	digests []layer.Digest
	hashes  []uint64 // XXH3-64, for the filter
	runs    []run
}

// run is a row of neighbouring blocks.
type run struct{ block, entry uint32 }

func newTables(size int64) *tables {
	return &tables{size: size, content: layer.NewContentHasher(size)}
}

// add adds a chunk, which comes after those before.
func (t *tables) add(c *chunk) error {
	if c.n*layer.ChunkSize >= t.size {
		return fmt.Errorf("chunk %d is outside a layer of %d bytes", c.n, t.size)
	}
	next := 0
	c.blocks(func(i int) {
		block, entry := uint32(c.n*layer.ChunkBlocks+int64(i)), uint32(len(t.digests)+next)
		if n := len(t.runs); n == 0 || block-t.runs[n-1].block != entry-t.runs[n-1].entry {
			t.runs = append(t.runs, run{block, entry})
		}
		next++
	})
	t.digests = append(t.digests, c.digests...)
	t.hashes = append(t.hashes, c.hashes...)
	t.content.Chunk(c.n, c.all())
	return nil
}

// write builds the remaining tables and writes the index.
func (t *tables) write(path string, id layer.ID, stamp layer.Stamp) error {
	entries := uint64(len(t.digests))
	h := &header{
		layerID: id, layerSize: t.size, entries: entries, runs: uint64(len(t.runs)),
		fanoutBits: fanoutBitsFor(entries), filterRows: filterRowsFor(entries), stamp: stamp,
	}
	h.place()
	body := make([]byte, h.end-headerSize)
	at := func(offset uint64) []byte { return body[offset-headerSize:] }
	for i := range t.digests {
		copy(at(h.digests)[16*i:], t.digests[i][:])
	}
	for i, r := range t.runs {
		binary.LittleEndian.PutUint32(at(h.runTable)[8*i:], r.block)
		binary.LittleEndian.PutUint32(at(h.runTable)[8*i+4:], r.entry)
	}
	t.sort(h.fanoutBits, at(h.fanout), at(h.order))
	filter := at(h.filter)
	for _, key := range t.hashes {
		filterAdd(filter, h.filterRows, key)
	}
	h.bodySum = xxh3.Hash128(body).Bytes()
	return writeFile(path, h.encode(), body)
}

// sort fills fanout and order: entries are dealt into buckets by the prefix of
// their digest, and the buckets are sorted on all cores.
func (t *tables) sort(bits uint32, fanout, order []byte) {
	starts := make([]uint32, 1<<bits+1)
	for i := range t.digests {
		starts[prefix(&t.digests[i], bits)+1]++
	}
	for i := 1; i < len(starts); i++ {
		starts[i] += starts[i-1]
	}
	for i, s := range starts {
		binary.LittleEndian.PutUint32(fanout[4*i:], s)
	}
	sorted := make([]uint32, len(t.digests))
	next := slices.Clone(starts)
	for i := range t.digests {
		p := prefix(&t.digests[i], bits)
		sorted[next[p]] = uint32(i)
		next[p]++
	}
	buckets := len(starts) - 1
	workers := min(runtime.GOMAXPROCS(0), buckets)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for b := buckets * w / workers; b < buckets*(w+1)/workers; b++ {
				slices.SortFunc(sorted[starts[b]:starts[b+1]], func(x, y uint32) int {
					if c := compare(&t.digests[x], &t.digests[y]); c != 0 {
						return c
					}
					return int(x) - int(y)
				})
			}
		})
	}
	wg.Wait()
	for i, entry := range sorted {
		binary.LittleEndian.PutUint32(order[4*i:], entry)
	}
}
