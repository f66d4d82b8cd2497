package live

import (
	"context"
	"errors"
	"fmt"
	"io"
	"runtime"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// incoming puts pages into the memory of the VM that arrives.
//
//	zeros, bytes   at once, by the reader of the connection they come on
//	names          by the provers: read the layer, prove
//	duplicates     when the round ends, and what they equal is here
//
// What is not proven is wanted as bytes, and nothing runs before these have come.
type incoming struct {
	r      *receiver
	mem    *memory.Space
	layers []io.ReaderAt

	// got are pages that came; filled those that are not holes; wanted those whose
	// names did not hold, until their bytes come.
	got, filled, wanted *memory.PageSet

	jobs    chan []byte // heads of names frames
	pending sync.WaitGroup
	provers sync.WaitGroup
	free    sync.Pool // of bytes for heads
	unpack  sync.Pool // of unpackers

	mu    sync.Mutex
	equal []wire.Duplicate // of this round

	sealed    atomic.Bool // no more pages
	counts    [kinds]atomic.Uint64
	roundDone atomic.Uint64 // pages
}

// unpacker is what a reader needs for compressed pages.
type unpacker struct {
	zstd        *zstd.Decoder
	packed, raw []byte
}

func newIncoming(r *receiver) *incoming {
	in := &incoming{
		r: r, mem: r.mem, layers: make([]io.ReaderAt, len(r.offer.Layers)),
		got: r.mem.NewPageSet(), filled: r.mem.NewPageSet(), wanted: r.mem.NewPageSet(),
	}
	in.jobs = make(chan []byte, 2*proverCount())
	in.unpack.New = func() any {
		d, _ := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(wire.MaxPayload),
			zstd.WithDecoderMaxWindow(wire.MaxPayload), zstd.WithDecoderLowmem(false)) // it cannot fail with these options
		return &unpacker{zstd: d, packed: make([]byte, wire.MaxPayload), raw: make([]byte, 0, wire.MaxPayload)}
	}
	return in
}

// proverCount is how many read layers at a time: disks like company.
func proverCount() int { return max(4, min(2*runtime.NumCPU(), 16)) }

// take takes a frame of pages.
func (in *incoming) take(from *wire.Reader, f wire.Frame) error {
	if p := in.r.pulling.Load(); p != nil {
		return p.take(in, from, f)
	}
	if in.sealed.Load() {
		return fmt.Errorf("the source sent %q after the last page", f.Type)
	}
	defer func() { in.r.progress(in.roundDone.Load()) }()
	switch f.Type {
	case wire.TypeZero:
		return in.zero(f)
	case wire.TypeNames:
		return in.names(f)
	case wire.TypeDuplicates:
		return in.duplicates(f)
	case wire.TypeRaw:
		return in.raw(from, f)
	case wire.TypeZstd:
		return in.zstd(from, f)
	default:
		return fmt.Errorf("the source sent %q out of turn", f.Type)
	}
}

// arrived notes that the pages of a range hold what they should.
func (in *incoming) arrived(r memory.Range, k kind) {
	pages := r.Size >> memory.PageShift
	in.counts[k].Add(pages)
	in.roundDone.Add(pages)
	in.r.done.Add(r.Size)
	in.got.Add(r.Start, r.Size)
	if k != kindZero {
		in.filled.Add(r.Start, r.Size)
		in.mem.Wrote(r.Start, r.Size)
	}
	in.wanted.Remove(r.Start, r.Size)
}

// zero makes pages zero. Holes are left alone.
func (in *incoming) zero(f wire.Frame) error {
	runs, _, err := wire.ParseRuns(f)
	if err != nil {
		return err
	}
	for i := range runs.Len() {
		r, err := rangeOf(in.mem, runs.At(i))
		if err != nil {
			return err
		}
		if in.filled.CountIn(r.Start, r.Size) > 0 {
			b, err := in.mem.Writable(r.Start, r.Size)
			if err != nil {
				return err
			}
			for at := 0; at < len(b); at += memory.PageSize {
				if in.filled.Has(r.Start + memory.GPA(at)) {
					clear(b[at : at+memory.PageSize])
				}
			}
			in.mem.Wrote(r.Start, r.Size)
		}
		in.arrived(r, kindZero)
	}
	return nil
}

// raw reads pages' bytes to where they belong.
func (in *incoming) raw(from *wire.Reader, f wire.Frame) error {
	head, err := wire.ParseBytes(f)
	if err != nil {
		return err
	}
	sum := xxh3.Hasher{}
	for i := range head.Runs.Len() {
		r, err := rangeOf(in.mem, head.Runs.At(i))
		if err != nil {
			return err
		}
		b, err := in.mem.Writable(r.Start, r.Size)
		if err != nil {
			return err
		}
		if len(b) >= populateFrom && in.filled.CountIn(r.Start, r.Size) == 0 {
			_ = unix.Madvise(b, unix.MADV_POPULATE_WRITE) // if it cannot, reading does
		}
		if err := from.ReadPayload(b); err != nil {
			return lost(err)
		}
		if f.Flags&wire.FlagSum != 0 {
			_, _ = sum.Write(b)
		}
		in.arrived(r, kindRaw)
	}
	if f.Flags&wire.FlagSum != 0 && sum.Sum64() != head.Sum {
		return errDamaged
	}
	return nil
}

// populateFrom is from how many bytes on one system call that populates memory is
// cheaper than faults while it is being filled.
const populateFrom = 64 << 10

// errDamaged is of bytes that changed on their way.
var errDamaged = errors.New("pages were damaged on their way: their checksum is wrong; is the network sound?")

// zstd unpacks pages.
func (in *incoming) zstd(from *wire.Reader, f wire.Frame) error {
	return in.unpackBytes(from, f, func(head wire.Bytes, rest []byte) error {
		for i := range head.Runs.Len() {
			r, err := rangeOf(in.mem, head.Runs.At(i))
			if err != nil {
				return err
			}
			b, err := in.mem.Writable(r.Start, r.Size)
			if err != nil {
				return err
			}
			rest = rest[copy(b, rest):]
			in.arrived(r, kindZstd)
		}
		return nil
	})
}

// unpackBytes reads the payload of a frame of bytes, compressed or not, and lends
// the pages.
func (in *incoming) unpackBytes(from *wire.Reader, f wire.Frame, use func(head wire.Bytes, pages []byte) error) error {
	head, err := wire.ParseBytes(f)
	if err != nil {
		return err
	}
	u := in.unpack.Get().(*unpacker)
	defer in.unpack.Put(u)
	pages := u.packed[:f.Payload]
	if err := from.ReadPayload(pages); err != nil {
		return lost(err)
	}
	if f.Flags&wire.FlagSum != 0 && xxh3.Hash(pages) != head.Sum {
		return errDamaged
	}
	if f.Type == wire.TypeZstd {
		if u.raw, err = u.zstd.DecodeAll(pages, u.raw[:0]); err != nil {
			return fmt.Errorf("compressed pages: %w", err)
		}
		pages = u.raw
	}
	if len(pages) != head.Pages<<memory.PageShift {
		return fmt.Errorf("%d compressed pages have %d bytes", head.Pages, len(pages))
	}
	return use(head, pages)
}

// duplicates keeps records until the round ends.
func (in *incoming) duplicates(f wire.Frame) error {
	in.mu.Lock()
	defer in.mu.Unlock()
	limit := in.mem.Size() >> memory.PageShift
	return wire.ParseDuplicates(f, func(d wire.Duplicate) error {
		if uint64(len(in.equal)) >= limit {
			return errors.New("the source sent more duplicates than there are pages")
		}
		for _, gfn := range []uint64{d.GFN, d.Of} {
			if _, err := rangeOf(in.mem, wire.Run{GFN: gfn, Count: 1}); err != nil {
				return err
			}
		}
		in.equal = append(in.equal, d)
		return nil
	})
}

// settle ends a round: every page that came in it is in memory or wanted.
func (in *incoming) settle() error {
	in.pending.Wait()
	in.mu.Lock()
	defer in.mu.Unlock()
	const share = 256
	n := (len(in.equal) + share - 1) / share
	err := parallel.Do(in.r.run, runtime.NumCPU(), n, func(_ context.Context, _, i int) error {
		for _, d := range in.equal[i*share : min((i+1)*share, len(in.equal))] {
			if err := in.duplicate(d); err != nil {
				return err
			}
		}
		return nil
	})
	in.equal = in.equal[:0]
	return err
}

// duplicate copies a page from the one that it equals, if it does.
func (in *incoming) duplicate(d wire.Duplicate) error {
	to := memory.Range{Start: memory.GFN(d.GFN).GPA(), Size: memory.PageSize}
	of, err := in.mem.View(memory.GFN(d.Of).GPA(), memory.PageSize)
	if err != nil {
		return err
	}
	var copied [memory.PageSize]byte
	copy(copied[:], of)
	if !in.r.proves(copied[:], d.Digest) {
		in.want(to)
		return nil
	}
	b, err := in.mem.Writable(to.Start, to.Size)
	if err != nil {
		return err
	}
	copy(b, copied[:])
	in.arrived(to, kindDuplicate)
	return nil
}

// want asks for pages as bytes, at the end of the round.
func (in *incoming) want(r memory.Range) {
	in.wanted.Add(r.Start, r.Size)
	in.counts[kindAsked].Add(r.Size >> memory.PageShift)
}

// complete seals memory and says whether every page is there, but those that come
// later.
func (in *incoming) complete(later *memory.PageSet) error {
	in.sealed.Store(true)
	for r := range later.Runs() {
		in.got.Add(r.Start, r.Size)
		in.wanted.Remove(r.Start, r.Size)
	}
	if n := in.wanted.Count(); n > 0 {
		return fmt.Errorf("the source did not send %d pages that were asked for", n)
	}
	if got, all := in.got.Count(), in.mem.Size()>>memory.PageShift; got != all {
		return fmt.Errorf("the source sent %d of %d pages", got, all)
	}
	return nil
}

// stop ends the provers.
func (in *incoming) stop() {
	in.sealed.Store(true)
	close(in.jobs)
	in.provers.Wait()
}
