package snapshot

import (
	"encoding/binary"
	"math"

	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
)

// The header of a page map. Offsets are in bytes, numbers little-endian.
const (
	offMagic      = 0   // 8 bytes
	offVersion    = 8   // u32
	offHeaderSize = 12  // u32
	offPageSize   = 16  // u32
	offDigestKind = 20  // u32
	offMapPages   = 24  // u64: pages of memory
	offRuns       = 32  // u64
	offBlockRuns  = 40  // u64
	offSlots      = 48  // u64: places in pages
	offFrames     = 56  // u64
	offFramePages = 64  // u32: slots of a frame, 0 for no compression
	offReserved   = 68  // 4 bytes
	offPagesSize  = 72  // u64: size of the file pages
	offBodySum    = 80  // XXH3-128 of all bytes behind the header
	offReserved2  = 96  // 24 bytes
	offHeaderSum  = 120 // XXH3-64 of the bytes before it

	headerSize   = 128
	magic        = "DITTOPGM"
	digestBLAKE3 = 1 // the first 16 bytes of BLAKE3

	runSize    = 16
	digestSize = 16
	frameSize  = 24
)

// Frames of compressed pages.
const (
	// framePages is how many pages a frame holds that is written: 128 KiB.
	framePages = 32
	// maxFramePages bounds those that are read: what a fault may cost.
	maxFramePages = 64
	// frameSlack bounds by how much a frame is longer than its pages.
	frameSlack = 1024
)

// frame is a row of compressed slots. Frame i holds the slots from
// i*framePages on.
type frame struct {
	offset uint64 // in pages
	size   uint32 // bytes there
	pages  uint32 // that it holds
	sum    uint64 // XXH3-64 of the bytes there
}

// pageMap says what every page of memory equals.
type pageMap struct {
	runs []Run
	// blockDigests[i] is over the digests of the pages of the i'th Block run.
	blockDigests []Digest
	// blockRun[i] is the place of run i among the Block runs.
	blockRun []uint32
	// digests[slot] is over the page at that place; none where no page is.
	digests    []Digest
	frames     []frame
	framePages uint32
	pagesSize  uint64
}

// bodySize is the size behind the header.
func bodySize(runs, blockRuns, slots, frames uint64) uint64 {
	return runs*runSize + blockRuns*digestSize + slots*digestSize + frames*frameSize
}

// encode returns the bytes of the page map.
func (p *pageMap) encode() []byte {
	body := bodySize(uint64(len(p.runs)), uint64(len(p.blockDigests)), uint64(len(p.digests)), uint64(len(p.frames)))
	b := make([]byte, headerSize, headerSize+body)
	le := binary.LittleEndian
	pages := uint64(0)
	for _, r := range p.runs {
		pages += r.Pages
		b = le.AppendUint32(b, uint32(r.Pages))
		b = append(b, byte(r.Kind), 0)
		b = le.AppendUint16(b, uint16(r.Layer))
		b = le.AppendUint64(b, r.Number)
	}
	for _, d := range p.blockDigests {
		b = append(b, d[:]...)
	}
	for _, d := range p.digests {
		b = append(b, d[:]...)
	}
	for _, f := range p.frames {
		b = le.AppendUint64(b, f.offset)
		b = le.AppendUint32(b, f.size)
		b = le.AppendUint32(b, f.pages)
		b = le.AppendUint64(b, f.sum)
	}
	copy(b[offMagic:], magic)
	le.PutUint32(b[offVersion:], Format)
	le.PutUint32(b[offHeaderSize:], headerSize)
	le.PutUint32(b[offPageSize:], memory.PageSize)
	le.PutUint32(b[offDigestKind:], digestBLAKE3)
	le.PutUint64(b[offMapPages:], pages)
	le.PutUint64(b[offRuns:], uint64(len(p.runs)))
	le.PutUint64(b[offBlockRuns:], uint64(len(p.blockDigests)))
	le.PutUint64(b[offSlots:], uint64(len(p.digests)))
	le.PutUint64(b[offFrames:], uint64(len(p.frames)))
	le.PutUint32(b[offFramePages:], p.framePages)
	le.PutUint64(b[offPagesSize:], p.pagesSize)
	sum := xxh3.Hash128(b[headerSize:]).Bytes()
	copy(b[offBodySum:], sum[:])
	le.PutUint64(b[offHeaderSum:], xxh3.Hash(b[:offHeaderSum]))
	return b
}

// slotDigest is the digest over the digests of the slots, which the manifest
// gives for the file pages.
func (p *pageMap) slotDigest() Digest {
	flat := make([]byte, 0, digestSize*len(p.digests))
	for _, d := range p.digests {
		flat = append(flat, d[:]...)
	}
	return digestOf(flat)
}

// mapScope is what a page map is checked against.
type mapScope struct {
	regions []memory.Range
	layers  []Layer
	parent  bool
}

// scope returns what the manifest's page map must fit.
func (m *Manifest) scope() mapScope {
	return mapScope{regions: m.regions(), layers: m.Layers, parent: m.Parent != nil}
}

// decodePageMap checks everything that a page map says. The rest of the package
// relies on all of it.
func decodePageMap(b []byte, scope mapScope) (*pageMap, error) {
	p, counts, err := decodeHeader(b, scope)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	body := b[headerSize:]
	take := func(n uint64) []byte {
		part := body[:n]
		body = body[n:]
		return part
	}
	if err := p.decodeRuns(take(counts.runs*runSize), scope); err != nil {
		return nil, err
	}
	if blocks := p.indexBlocks(); blocks != counts.blockRuns {
		return nil, formatError("page map: digests of %d runs of blocks for %d runs", counts.blockRuns, blocks)
	}
	p.blockDigests = digests(take(counts.blockRuns * digestSize))
	p.digests = digests(take(counts.slots * digestSize))
	for f := take(counts.frames * frameSize); len(f) > 0; f = f[frameSize:] {
		p.frames = append(p.frames, frame{le.Uint64(f), le.Uint32(f[8:]), le.Uint32(f[12:]), le.Uint64(f[16:])})
	}
	if err := p.checkFrames(); err != nil {
		return nil, err
	}
	if err := p.checkSlots(); err != nil {
		return nil, err
	}
	return p, p.checkTargets()
}

func digests(b []byte) []Digest {
	all := make([]Digest, len(b)/digestSize)
	for i := range all {
		all[i] = Digest(b[i*digestSize:])
	}
	return all
}

// mapCounts are the numbers of entries of a page map's tables.
type mapCounts struct{ runs, blockRuns, slots, frames uint64 }

func decodeHeader(b []byte, scope mapScope) (*pageMap, mapCounts, error) {
	none := mapCounts{}
	if len(b) < headerSize {
		return nil, none, formatError("page map: %d bytes are too few", len(b))
	}
	le := binary.LittleEndian
	if string(b[:len(magic)]) != magic {
		return nil, none, formatError("page map: it does not begin with %s", magic)
	}
	if v := le.Uint32(b[offVersion:]); v > Format {
		return nil, none, writeVersion(v)
	}
	if le.Uint64(b[offHeaderSum:]) != xxh3.Hash(b[:offHeaderSum]) {
		return nil, none, formatError("page map: the header was altered")
	}
	if le.Uint32(b[offVersion:]) != Format || le.Uint32(b[offHeaderSize:]) != headerSize || le.Uint32(b[offPageSize:]) != memory.PageSize ||
		le.Uint32(b[offDigestKind:]) != digestBLAKE3 || le.Uint32(b[offReserved:]) != 0 || [offHeaderSum - offReserved2]byte(b[offReserved2:]) != [offHeaderSum - offReserved2]byte{} {
		return nil, none, formatError("page map: header %x", b[:headerSize])
	}
	c := mapCounts{le.Uint64(b[offRuns:]), le.Uint64(b[offBlockRuns:]), le.Uint64(b[offSlots:]), le.Uint64(b[offFrames:])}
	p := &pageMap{framePages: le.Uint32(b[offFramePages:]), pagesSize: le.Uint64(b[offPagesSize:])}
	pages := uint64(0)
	for _, r := range scope.regions {
		pages += r.Size / memory.PageSize
	}
	most := pages * max(1, uint64(p.framePages))
	switch {
	case le.Uint64(b[offMapPages:]) != pages:
		return nil, none, formatError("page map: %d pages of a memory of %d", le.Uint64(b[offMapPages:]), pages)
	case p.framePages > maxFramePages || c.runs > pages || c.blockRuns > c.runs || c.slots > most || c.frames > pages || p.pagesSize > math.MaxInt64:
		return nil, none, formatError("page map: %d runs, %d of blocks, %d slots, %d frames of %d pages for %d pages",
			c.runs, c.blockRuns, c.slots, c.frames, p.framePages, pages)
	}
	if want := headerSize + bodySize(c.runs, c.blockRuns, c.slots, c.frames); want != uint64(len(b)) {
		return nil, none, formatError("page map: it has %d bytes and should have %d: truncated", len(b), want)
	}
	if sum := xxh3.Hash128(b[headerSize:]).Bytes(); sum != [16]byte(b[offBodySum:]) {
		return nil, none, formatError("page map: its content was altered")
	}
	return p, c, nil
}

// decodeRuns lays the runs over memory, one after the other, and checks each.
func (p *pageMap) decodeRuns(b []byte, scope mapScope) error {
	le := binary.LittleEndian
	p.runs = make([]Run, 0, len(b)/runSize)
	regions := scope.regions
	at := regions[0].Start.GFN()
	for ; len(b) > 0; b = b[runSize:] {
		r := Run{Start: at, Pages: uint64(le.Uint32(b)), Kind: Kind(b[4]), Layer: int(le.Uint16(b[6:])), Number: le.Uint64(b[8:])}
		if len(regions) == 0 || r.Pages == 0 || r.End() > regions[0].End().GFN() {
			return formatError("page map: run %d: %d pages from %s on lie outside of memory", len(p.runs), r.Pages, r.Start)
		}
		if b[5] != 0 || !r.sound(scope) {
			return formatError("page map: run %d: flags %#x, %s, layer %d, number %d", len(p.runs), b[5], r.Kind, r.Layer, r.Number)
		}
		p.runs = append(p.runs, r)
		if at = r.End(); at == regions[0].End().GFN() {
			if regions = regions[1:]; len(regions) > 0 {
				at = regions[0].Start.GFN()
			}
		}
	}
	if len(regions) > 0 {
		return formatError("page map: it ends at page %s", at)
	}
	return nil
}

// sound checks a run by itself.
func (r *Run) sound(scope mapScope) bool {
	switch r.Kind {
	case Zero:
		return r.Layer == 0 && r.Number == 0
	case FromParent:
		return r.Layer == 0 && r.Number == 0 && scope.parent
	case Block:
		if r.Layer >= len(scope.layers) || r.Pages > maxBlockRun {
			return false
		}
		blocks := uint64(scope.layers[r.Layer].Size) / memory.PageSize
		return r.Number < blocks && r.Pages <= blocks-r.Number
	case Page, Unique:
		return r.Layer == 0 && r.Number <= math.MaxUint32
	}
	return false
}

// indexBlocks numbers the runs of blocks, and returns how many there are.
func (p *pageMap) indexBlocks() uint64 {
	n := uint32(0)
	p.blockRun = make([]uint32, len(p.runs))
	for i := range p.runs {
		p.blockRun[i] = n
		if p.runs[i].Kind == Block {
			n++
		}
	}
	return uint64(n)
}
