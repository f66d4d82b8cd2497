package index

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/zeebo/xxh3"

	"ditto.vm/images/layer"
)

// seal makes of any bytes an index whose fixed fields, size and checksums are
// right, so that the fuzzer gets at what lies behind them: the counts of the
// header and the tables.
func seal(b []byte) []byte {
	if len(b) < headerSize {
		b = append(b, make([]byte, headerSize-len(b))...)
	}
	le := binary.LittleEndian
	h := header{
		entries: le.Uint64(b[offEntries:]) % 2000, runs: le.Uint64(b[offRuns:]) % 2000,
		fanoutBits: le.Uint32(b[offFanoutBits:]) % 12, filterRows: le.Uint32(b[offFilterRows:]) % 200,
		layerSize: int64(le.Uint64(b[offLayerSize:])),
	}
	copy(h.layerID[:], b[offLayerID:])
	h.layerID[6], h.layerID[8] = h.layerID[6]&0x0f|0x80, h.layerID[8]&0x3f|0x80
	h.place()
	body := make([]byte, h.end-headerSize)
	copy(body, b[headerSize:])
	h.bodySum = xxh3.Hash128(body).Bytes()
	return append(h.encode(), body...)
}

// FuzzParse feeds the loader bytes with right checksums: it refuses them or
// answers every question without reading outside.
func FuzzParse(f *testing.F) {
	for _, content := range [][]byte{nil, bytes.Repeat([]byte{1}, 3*layer.BlockSize), sample()[:40*layer.BlockSize]} {
		path := filepath.Join(f.TempDir(), "x")
		mustBuild(f, newMemSource(content), path, Options{})
		b, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, uint64(1))
	}
	f.Fuzz(func(t *testing.T, b []byte, block uint64) {
		x, err := parse(seal(b))
		if err != nil {
			if !errors.Is(err, ErrFormat) {
				t.Errorf("%v does not wrap ErrFormat", err)
			}
			return
		}
		_ = x.MayHold(block)
		d, _ := x.Digest(block)
		for n := range x.Blocks(d) {
			if n*layer.BlockSize >= uint64(x.LayerSize()) {
				t.Errorf("block %d of a layer of %d bytes", n, x.LayerSize())
			}
		}
		for entry := range min(x.Entries(), 1000) {
			d, ok := x.Digest(x.blockOf(uint32(entry)))
			if !ok || d != *x.digest(uint32(entry)) {
				t.Errorf("entry %d is not found by its block", entry)
			}
		}
	})
}

// FuzzJournal feeds the journal reader records: what it yields is consistent.
func FuzzJournal(f *testing.F) {
	var c chunk
	c.hash(0, sample()[:10*layer.BlockSize])
	head := make([]byte, recordHead)
	binary.LittleEndian.PutUint32(head[4:], uint32(len(c.digests)))
	record := c.encode(head)
	f.Add(record, true)
	f.Add(append(bytes.Clone(record), record...), true)
	f.Fuzz(func(t *testing.T, b []byte, fix bool) {
		if fix && len(b) >= recordHead+bitmapSize {
			count := binary.LittleEndian.Uint32(b[4:])
			if end := recordHead + bitmapSize + uint64(count)*24; count <= layer.ChunkBlocks && end <= uint64(len(b)) {
				binary.LittleEndian.PutUint64(b[8:], recordSum(b[:recordHead], b[recordHead:end]))
			}
		}
		last := int64(-1)
		for c := range records(bytes.NewReader(b), 0) {
			n := 0
			c.blocks(func(int) { n++ })
			if c.n <= last || n != len(c.digests) || n != len(c.hashes) || n == 0 {
				t.Errorf("chunk %d after %d: %d blocks, %d digests, %d hashes", c.n, last, n, len(c.digests), len(c.hashes))
			}
			last = c.n
		}
	})
}
