package wire

import (
	"encoding/binary"
)

// Run is so many pages from a page number on.
type Run struct {
	GFN   uint64
	Count uint32
}

// Sizes of records in bytes.
const (
	RunSize       = 12 // page number 8, count 4
	NameSize      = 20 // page number 8, block 8, layer 2, count 2; then a digest a page
	DuplicateSize = 32 // page number 8, page that it equals 8, digest
	sumSize       = 8
	// MaxRuns is how many runs a frame can have.
	MaxRuns = (MaxHead - sumSize) / RunSize
)

// AppendRun appends a run to a head.
func AppendRun(b []byte, r Run) []byte {
	b = binary.LittleEndian.AppendUint64(b, r.GFN)
	return binary.LittleEndian.AppendUint32(b, r.Count)
}

// Runs are the runs of a frame, as they came.
type Runs struct{ b []byte }

// Len returns how many runs there are.
func (r Runs) Len() int { return len(r.b) / RunSize }

// At returns a run.
func (r Runs) At(i int) Run {
	b := r.b[i*RunSize : (i+1)*RunSize]
	return Run{GFN: binary.LittleEndian.Uint64(b), Count: binary.LittleEndian.Uint32(b[8:])}
}

// parseRuns checks runs and counts their pages.
func parseRuns(t Type, b []byte) (r Runs, pages uint64, err error) {
	if len(b)%RunSize != 0 || len(b) == 0 {
		return Runs{}, 0, bad(t, "%d bytes of runs", len(b))
	}
	r = Runs{b}
	for i := range r.Len() {
		run := r.At(i)
		if !run.sane() {
			return Runs{}, 0, bad(t, "%d pages from %#x on", run.Count, run.GFN)
		}
		pages += uint64(run.Count)
	}
	return r, pages, nil
}

// sane refuses runs that are empty or overflow.
func (r Run) sane() bool { return r.Count > 0 && r.GFN < maxGFN && r.GFN+uint64(r.Count) <= maxGFN }

// ParseRuns returns the runs of a frame that has nothing else: [TypeZero],
// [TypeWant], [TypeMissing], and how many pages they are of.
func ParseRuns(f Frame) (Runs, uint64, error) {
	switch f.Type {
	case TypeZero, TypeWant, TypeMissing:
		return parseRuns(f.Type, f.Head)
	}
	return Runs{}, 0, bad(f.Type, "has no runs")
}

// Bytes is the head of a frame whose payload are pages' bytes, raw or compressed.
//
//	0  8  XXH3-64 of the payload, or zero without FlagSum
//	8     runs, whose pages' bytes follow each other
type Bytes struct {
	Runs  Runs
	Pages int
	Sum   uint64 // 0 without FlagSum
}

// ParseBytes takes the head of a [TypeRaw] or [TypeZstd] frame apart. It has at
// most [MaxBatch] pages; of raw ones the payload has exactly the bytes, and
// compressed ones are fewer.
func ParseBytes(f Frame) (Bytes, error) {
	if f.Type != TypeRaw && f.Type != TypeZstd {
		return Bytes{}, bad(f.Type, "has no bytes of pages")
	}
	if len(f.Head) < sumSize {
		return Bytes{}, bad(f.Type, "too short")
	}
	m := Bytes{Sum: binary.LittleEndian.Uint64(f.Head)}
	if f.Flags&FlagSum == 0 && m.Sum != 0 {
		return Bytes{}, bad(f.Type, "has a checksum that its flags do not tell of")
	}
	runs, pages, err := parseRuns(f.Type, f.Head[sumSize:])
	switch {
	case err != nil:
		return Bytes{}, err
	case pages > MaxBatch:
		return Bytes{}, bad(f.Type, "%d pages are more than %d", pages, MaxBatch)
	case f.Type == TypeRaw && uint64(f.Payload) != pages*PageSize:
		return Bytes{}, bad(f.Type, "%d bytes for %d pages", f.Payload, pages)
	case f.Type == TypeZstd && (f.Payload == 0 || uint64(f.Payload) >= pages*PageSize):
		return Bytes{}, bad(f.Type, "%d bytes for %d pages", f.Payload, pages)
	}
	m.Runs, m.Pages = runs, int(pages)
	return m, nil
}

// BeginBytes appends the beginning of a frame of pages' bytes; runs follow, and
// then [FinishBytes].
func BeginBytes(b []byte) []byte { return append(Begin(b), make([]byte, sumSize)...) }

// FinishBytes fills in the header of the frame that begins at start, with the
// checksum of the payload if it has one.
func FinishBytes(b []byte, start int, t Type, payload int, sum uint64, summed bool) []byte {
	flags := uint8(0)
	if summed {
		flags = FlagSum
		binary.LittleEndian.PutUint64(b[start+HeaderSize:], sum)
	}
	return Finish(b, start, t, flags, payload)
}

// Name says that pages equal consecutive blocks of a layer, each with the digest
// of its page.
type Name struct {
	Run
	Layer   uint16
	Block   uint64
	Digests []byte // DigestSize a page
}

// AppendName appends a record to a head, without its digests, which follow.
func AppendName(b []byte, gfn, block uint64, layer, count uint16) []byte {
	b = binary.LittleEndian.AppendUint64(b, gfn)
	b = binary.LittleEndian.AppendUint64(b, block)
	b = binary.LittleEndian.AppendUint16(b, layer)
	return binary.LittleEndian.AppendUint16(b, count)
}

// SetNameCount changes the count of the record that begins at start.
func SetNameCount(b []byte, start int, count uint16) {
	binary.LittleEndian.PutUint16(b[start+18:], count)
}

// maxBlock bounds blocks: 2^56 bytes of a layer.
const maxBlock = 1 << 44

// ParseNames calls visit with each record of a [TypeNames] frame, until it fails.
// The digests alias the frame.
func ParseNames(f Frame, visit func(Name) error) error {
	if f.Type != TypeNames || len(f.Head) == 0 {
		return bad(f.Type, "has no names")
	}
	for b := f.Head; len(b) > 0; {
		if len(b) < NameSize {
			return bad(f.Type, "too short")
		}
		n := Name{
			Run:   Run{GFN: binary.LittleEndian.Uint64(b), Count: uint32(binary.LittleEndian.Uint16(b[18:]))},
			Block: binary.LittleEndian.Uint64(b[8:]),
			Layer: binary.LittleEndian.Uint16(b[16:]),
		}
		if !n.sane() || n.Layer >= MaxLayers || n.Block >= maxBlock {
			return bad(f.Type, "%d pages from %#x on, block %#x of layer %d", n.Count, n.GFN, n.Block, n.Layer)
		}
		size := NameSize + int(n.Count)*DigestSize
		if len(b) < size {
			return bad(f.Type, "too short")
		}
		n.Digests = b[NameSize:size]
		if err := visit(n); err != nil {
			return err
		}
		b = b[size:]
	}
	return nil
}

// Duplicate says that a page equals another one, with the digest of both.
type Duplicate struct {
	GFN, Of uint64
	Digest  [DigestSize]byte
}

// AppendDuplicate appends a record to a head.
func AppendDuplicate(b []byte, d Duplicate) []byte {
	b = binary.LittleEndian.AppendUint64(b, d.GFN)
	b = binary.LittleEndian.AppendUint64(b, d.Of)
	return append(b, d.Digest[:]...)
}

// ParseDuplicates calls visit with each record of a [TypeDuplicates] frame, until
// it fails.
func ParseDuplicates(f Frame, visit func(Duplicate) error) error {
	if f.Type != TypeDuplicates || len(f.Head) == 0 || len(f.Head)%DuplicateSize != 0 {
		return bad(f.Type, "%d bytes of duplicates", len(f.Head))
	}
	for b := f.Head; len(b) > 0; b = b[DuplicateSize:] {
		d := Duplicate{
			GFN:    binary.LittleEndian.Uint64(b),
			Of:     binary.LittleEndian.Uint64(b[8:]),
			Digest: [DigestSize]byte(b[16:]),
		}
		if d.GFN >= maxGFN || d.Of >= maxGFN || d.GFN == d.Of {
			return bad(f.Type, "page %#x as page %#x", d.GFN, d.Of)
		}
		if err := visit(d); err != nil {
			return err
		}
	}
	return nil
}

// Request asks, in post-copy, for pages that are missing; the answer is pages that
// come with the request's number.
//
//	0  4  number
//	4  4  zero
//	8     runs
type Request struct {
	Number uint32
	Runs   Runs
	Pages  uint64
}

// ParseRequest takes a [TypeRequest] frame apart.
func ParseRequest(f Frame) (Request, error) {
	if f.Type != TypeRequest || len(f.Head) < 8 || binary.LittleEndian.Uint32(f.Head[4:]) != 0 {
		return Request{}, bad(f.Type, "is no request")
	}
	runs, pages, err := parseRuns(f.Type, f.Head[8:])
	return Request{Number: binary.LittleEndian.Uint32(f.Head), Runs: runs, Pages: pages}, err
}

// AppendRequest appends the beginning of a request's head; runs follow.
func AppendRequest(b []byte, number uint32) []byte {
	b = binary.LittleEndian.AppendUint32(b, number)
	return binary.LittleEndian.AppendUint32(b, 0)
}
