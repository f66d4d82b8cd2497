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
	offHeadSum    = 80  // XXH3-128 of the rest of the head
	offSeed       = 96  // u64: of the digests of pages and block runs
	offReserved2  = 104 // 16 bytes
	offHeaderSum  = 120 // XXH3-64 of the bytes before it

	headerSize = 128
	magic      = "DITTOPGM"
	digestXXH3 = 2 // XXH3-128 with the header's seed

	// runIndexed is the flag of [Run.Indexed].
	runIndexed = 1

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
//
//	header | runs | frames | digests of the parts || digests, in parts
//	`----------------- head -------------------'
//
// The head is read and checked whole, and proves the rest: a part is read, and
// compared with its digest, when a digest in it is wanted. So what opening costs
// follows the number of runs, not that of pages.
type pageMap struct {
	runs []Run
	// blocks are the places of the Block runs among the runs, and holds what all of
	// them add up to.
	blocks     []uint32
	holds      Holds
	frames     []frame
	framePages uint32
	pagesSize  uint64
	seed       uint64 // of the digests of pages and of block runs
	// slots are the places in pages, and used has a bit for each that a page is
	// in.
	slots uint64
	used  []uint64

	// A page map that is written has all digests: over those of the pages of the
	// i'th Block run, and over the page at each place, none where no page is.
	blockDigests, digests []Digest
	// One that is read fetches them.
	table digestTable
}

// headSize is the size of the head.
func headSize(c mapCounts) uint64 {
	return headerSize + c.runs*runSize + c.frames*frameSize + partsOf(c.blockRuns+c.slots)*digestSize
}

// counts returns the numbers of entries of a page map that is written.
func (p *pageMap) counts() mapCounts {
	return mapCounts{uint64(len(p.runs)), uint64(len(p.blockDigests)), uint64(len(p.digests)), uint64(len(p.frames))}
}

// encode returns the bytes of the page map, and how many of them are its head.
func (p *pageMap) encode() (b []byte, head uint64) {
	c := p.counts()
	head = headSize(c)
	b = make([]byte, headerSize, head+(c.blockRuns+c.slots)*digestSize)
	le := binary.LittleEndian
	pages := uint64(0)
	for _, r := range p.runs {
		pages += r.Pages
		b = le.AppendUint32(b, uint32(r.Pages))
		b = append(b, byte(r.Kind), r.flags())
		b = le.AppendUint16(b, uint16(r.Layer))
		b = le.AppendUint64(b, r.Number)
	}
	for _, f := range p.frames {
		b = le.AppendUint64(b, f.offset)
		b = le.AppendUint32(b, f.size)
		b = le.AppendUint32(b, f.pages)
		b = le.AppendUint64(b, f.sum)
	}
	parts := uint64(len(b))
	b = b[:head]
	for _, all := range [][]Digest{p.blockDigests, p.digests} {
		for _, d := range all {
			b = append(b, d[:]...)
		}
	}
	for at := head; at < uint64(len(b)); at += partSize {
		d := digestOf(b[at:min(at+partSize, uint64(len(b)))])
		parts += uint64(copy(b[parts:], d[:]))
	}
	copy(b[offMagic:], magic)
	le.PutUint32(b[offVersion:], Format)
	le.PutUint32(b[offHeaderSize:], headerSize)
	le.PutUint32(b[offPageSize:], memory.PageSize)
	le.PutUint32(b[offDigestKind:], digestXXH3)
	le.PutUint64(b[offSeed:], p.seed)
	le.PutUint64(b[offMapPages:], pages)
	le.PutUint64(b[offRuns:], c.runs)
	le.PutUint64(b[offBlockRuns:], c.blockRuns)
	le.PutUint64(b[offSlots:], c.slots)
	le.PutUint64(b[offFrames:], c.frames)
	le.PutUint32(b[offFramePages:], p.framePages)
	le.PutUint64(b[offPagesSize:], p.pagesSize)
	sum := xxh3.Hash128(b[headerSize:head]).Bytes()
	copy(b[offHeadSum:], sum[:])
	le.PutUint64(b[offHeaderSum:], xxh3.Hash(b[:offHeaderSum]))
	return b, head
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

// decodePageMap checks everything that the head of a page map says. The rest of
// the package relies on all of it. The file behind it is so long as is said.
func decodePageMap(head []byte, size uint64, scope mapScope) (*pageMap, error) {
	p, counts, err := decodeHeader(head, size, scope)
	if err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	body := head[headerSize:]
	take := func(n uint64) []byte {
		part := body[:n]
		body = body[n:]
		return part
	}
	if err := p.decodeRuns(take(counts.runs*runSize), scope); err != nil {
		return nil, err
	}
	if blocks := len(p.blocks); uint64(blocks) != counts.blockRuns {
		return nil, formatError("page map: digests of %d runs of blocks for %d runs", counts.blockRuns, blocks)
	}
	p.frames = make([]frame, 0, counts.frames)
	for f := take(counts.frames * frameSize); len(f) > 0; f = f[frameSize:] {
		p.frames = append(p.frames, frame{le.Uint64(f), le.Uint32(f[8:]), le.Uint32(f[12:]), le.Uint64(f[16:])})
	}
	p.slots = counts.slots
	p.table = newDigestTable(digests(body), counts)
	if err := p.checkFrames(); err != nil {
		return nil, err
	}
	if err := p.markSlots(); err != nil {
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

// decodeHeader checks the header and the sum of the head.
func decodeHeader(b []byte, size uint64, scope mapScope) (*pageMap, mapCounts, error) {
	p, c, err := readHeader(b, scope)
	if err != nil {
		return nil, c, err
	}
	head := headSize(c)
	if want := head + (c.blockRuns+c.slots)*digestSize; want != size || uint64(len(b)) != head {
		return nil, c, formatError("page map: it has %d bytes and should have %d: truncated", size, want)
	}
	if sum := xxh3.Hash128(b[headerSize:]).Bytes(); sum != [16]byte(b[offHeadSum:]) {
		return nil, c, formatError("page map: its content was altered")
	}
	return p, c, nil
}

// readHeader reads and checks the header alone, which says how long the rest is.
func readHeader(b []byte, scope mapScope) (*pageMap, mapCounts, error) {
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
		le.Uint32(b[offDigestKind:]) != digestXXH3 || le.Uint32(b[offReserved:]) != 0 || [offHeaderSum - offReserved2]byte(b[offReserved2:]) != [offHeaderSum - offReserved2]byte{} {
		return nil, none, formatError("page map: header %x", b[:headerSize])
	}
	c := mapCounts{le.Uint64(b[offRuns:]), le.Uint64(b[offBlockRuns:]), le.Uint64(b[offSlots:]), le.Uint64(b[offFrames:])}
	p := &pageMap{seed: le.Uint64(b[offSeed:]), framePages: le.Uint32(b[offFramePages:]), pagesSize: le.Uint64(b[offPagesSize:])}
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
	return p, c, nil
}

// decodeRuns lays the runs over memory, one after the other, and checks each.
func (p *pageMap) decodeRuns(b []byte, scope mapScope) error {
	le := binary.LittleEndian
	p.runs = make([]Run, 0, len(b)/runSize)
	regions := scope.regions
	at := regions[0].Start.GFN()
	for ; len(b) > 0; b = b[runSize:] {
		r := Run{Start: at, Pages: uint64(le.Uint32(b)), Kind: Kind(b[4]), Layer: int(le.Uint16(b[6:])), Number: le.Uint64(b[8:]), Indexed: b[5] == runIndexed}
		if len(regions) == 0 || r.Pages == 0 || r.End() > regions[0].End().GFN() {
			return formatError("page map: run %d: %d pages from %s on lie outside of memory", len(p.runs), r.Pages, r.Start)
		}
		if b[5] != r.flags() || !r.sound(scope) {
			return formatError("page map: run %d: flags %#x, %s, layer %d, number %d", len(p.runs), b[5], r.Kind, r.Layer, r.Number)
		}
		p.add(r)
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
	if r.Indexed && r.Kind != Block {
		return false
	}
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

// add appends a run.
func (p *pageMap) add(r Run) {
	if r.Kind == Block {
		p.blocks = append(p.blocks, uint32(len(p.runs)))
	}
	p.runs = append(p.runs, r)
	p.holds.add(r)
}

// index notes what the runs are, of a page map that is written.
func (p *pageMap) index() {
	runs := p.runs
	p.runs, p.blocks, p.holds = runs[:0], nil, Holds{}
	for _, r := range runs {
		p.add(r)
	}
}

// add adds what a run holds.
func (h *Holds) add(r Run) {
	bytes := r.Pages * memory.PageSize
	switch r.Kind {
	case Zero:
		h.Zero += bytes
	case Block:
		h.Blocks += bytes
	case Page:
		h.Duplicate += bytes
	case FromParent:
		h.Parent += bytes
	case Unique:
		h.Unique += bytes
	}
}
