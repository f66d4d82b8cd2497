package snapshot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/zeebo/xxh3"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
)

// FuzzManifest feeds the decoder manifests, sealed or not: it refuses them, or
// what it returns can be written and read again.
func FuzzManifest(f *testing.F) {
	for _, name := range []string{"none-base", "zstd-child"} {
		b, err := os.ReadFile(filepath.Join("testdata/golden1", name, ManifestName))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b[:len(b)-sealSize], true)
		f.Add(b, false)
	}
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			id := seal(b)
			b = append(bytes.Clone(b), sealBefore+id.String()+sealAfter...)
		}
		m, id, err := ParseManifest(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) {
				t.Errorf("%v wraps neither ErrFormat nor ErrVersion", err)
			}
			return
		}
		if id == (ID{}) || m.Format != Format {
			t.Errorf("identity %s, format %d", id, m.Format)
		}
		again, _, err := m.encode()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := ParseManifest(again); err != nil {
			t.Errorf("%v, after\n%s\nbecame\n%s", err, b, again)
		}
	})
}

// fuzzScope is what fuzzed page maps are of.
var fuzzScope = mapScope{
	regions: []memory.Range{{Start: 0, Size: 1 << 20}},
	layers:  []Layer{{Size: 300*memory.PageSize + 100}, {Size: 5 * memory.PageSize}},
	parent:  true,
}

// readPageMap decodes a page map that is at hand, and fetches all of it.
func readPageMap(b []byte) (*pageMap, error) {
	_, c, err := readHeader(b, fuzzScope)
	if err != nil {
		return nil, err
	}
	p, err := decodePageMap(b[:min(uint64(len(b)), headSize(c))], uint64(len(b)), fuzzScope)
	if err != nil {
		return nil, err
	}
	p.table.file = bytes.NewReader(b)
	if p.digests, err = p.all(); err != nil {
		return nil, err
	}
	for _, i := range p.blocks {
		d, err := p.blockDigest(int(i))
		if err != nil {
			return nil, err
		}
		p.blockDigests = append(p.blockDigests, d)
	}
	return p, nil
}

// sealMap gives bytes a header whose sums and fixed fields are right, and parts
// that are proven, so that the fuzzer gets at what lies behind them.
func sealMap(b []byte) []byte {
	b = bytes.Clone(b)
	if len(b) < headerSize {
		b = append(b, make([]byte, headerSize-len(b))...)
	}
	le := binary.LittleEndian
	for _, at := range []int{offRuns, offBlockRuns, offSlots, offFrames} {
		le.PutUint64(b[at:], le.Uint64(b[at:])%300)
	}
	c := mapCounts{le.Uint64(b[offRuns:]), le.Uint64(b[offBlockRuns:]), le.Uint64(b[offSlots:]), le.Uint64(b[offFrames:])}
	head, tail := headSize(c), (c.blockRuns+c.slots)*digestSize
	b = append(b, make([]byte, head+tail)...)[:head+tail]
	for at, part := head-partsOf(tail/digestSize)*digestSize, head; part < head+tail; part += partSize {
		d := digestOf(b[part:min(part+partSize, head+tail)])
		at += uint64(copy(b[at:], d[:]))
	}
	copy(b[offMagic:], magic)
	le.PutUint32(b[offVersion:], Format)
	le.PutUint32(b[offHeaderSize:], headerSize)
	le.PutUint32(b[offPageSize:], memory.PageSize)
	le.PutUint32(b[offDigestKind:], digestXXH3)
	le.PutUint64(b[offMapPages:], 256)
	le.PutUint32(b[offReserved:], 0)
	clear(b[offReserved2:offHeaderSum])
	sum := xxh3.Hash128(b[headerSize:head]).Bytes()
	copy(b[offHeadSum:], sum[:])
	le.PutUint64(b[offHeaderSum:], xxh3.Hash(b[:offHeaderSum]))
	return b
}

// FuzzPageMap feeds the decoder page maps with right sums: it refuses them, or
// every page can be looked up, stands where there is something, and the bytes
// are what encoding gives.
func FuzzPageMap(f *testing.F) {
	for _, name := range []string{"none-base", "none-child", "zstd-base", "zstd-child"} {
		b, err := os.ReadFile(filepath.Join("testdata/golden1", name, PageMapName))
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b, true)
		f.Add(b, false)
	}
	parent := &Snapshot{p: &pageMap{runs: []Run{{Pages: 200, Kind: Zero}, {Start: 200, Pages: 50, Kind: Unique}, {Start: 250, Pages: 6, Kind: Page, Number: 200}}}}
	parent.flatten()
	f.Fuzz(func(t *testing.T, b []byte, sealed bool) {
		if sealed {
			b = sealMap(b)
		}
		p, err := readPageMap(b)
		if err != nil {
			if !errors.Is(err, ErrFormat) && !errors.Is(err, ErrVersion) {
				t.Errorf("%v wraps neither ErrFormat nor ErrVersion", err)
			}
			return
		}
		if again, _ := p.encode(); !bytes.Equal(again, b) {
			t.Errorf("encoded again, the page map is another")
		}
		s := &Snapshot{p: p, parent: parent, m: &Manifest{Layers: fuzzScope.layers}}
		s.flatten()
		s.checkPages(t)
		p.checkGaps(t)
	})
}

// checkPages looks up every page of a snapshot with a made-up parent.
func (s *Snapshot) checkPages(t *testing.T) {
	for gfn := range memory.GFN(256) {
		r, ok := s.resolve(gfn)
		if !ok || r.Pages != 1 || r.Start != gfn || r.Kind != Zero && r.Kind != Block && r.Kind != Unique {
			t.Fatalf("page %s is %+v", gfn, r.Run)
		}
		if r.Kind == Block && int64(r.Number+1)*layer.BlockSize > fuzzScope.layers[r.Layer].Size ||
			r.Kind == Unique && r.src == s && r.Number >= s.p.slots {
			t.Fatalf("page %s is at %d", gfn, r.Number)
		}
	}
	if _, ok := s.resolve(256); ok {
		t.Error("there is a page behind the last")
	}
}

// checkGaps checks that what belongs to no page lies in pages.
func (p *pageMap) checkGaps(t *testing.T) {
	end := uint64(0)
	for at, size := range p.gaps() {
		if at < end || size == 0 || at+size > p.pagesSize {
			t.Fatalf("a gap of %d bytes at %d, in %d", size, at, p.pagesSize)
		}
		end = at + size
	}
}
