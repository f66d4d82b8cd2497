package live

import (
	"context"
	"encoding/binary"
	"net"

	"github.com/klauspost/compress/zstd"
	"github.com/zeebo/xxh3"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/wire"
)

// worker sends batches of pages on one connection, which it may share. A batch
// becomes up to four frames, written at once.
//
//	pages --> zero?  -----------> runs
//	          named, held? -----> digest, names
//	          equal to another? -> digest, duplicates
//	          else  ------------> bytes: copied and summed, or compressed, or
//	                              straight from guest memory (writev)
//
// What is read here the guest may be writing: such a page is collected later and
// sent again, so that its bytes and its digest may be torn now. But the checksum
// of a frame must be that of the bytes sent, and zstd must not see them change:
// both work on a copy.
type worker struct {
	s    *sender
	link *link

	names []names.Name
	// Heads of frames under way, without room for headers.
	zero, named, dup    []byte
	nZero, nNamed, nDup uint64
	nRaw, nAsked        int

	raw     []memory.Range // pages that travel as bytes
	out     []byte         // frames
	copied  []byte         // the bytes of raw, to be compressed
	vectors net.Buffers
	zstd    *zstd.Encoder

	// The record of names that can be continued: where it begins in named, and
	// what would continue it.
	open                int
	openGFN, openBlock  uint64
	openLayer, openSize uint16
}

func newWorker(s *sender, l *link) *worker {
	w := &worker{s: s, link: l, open: -1}
	if s.o.Compression == Zstd {
		// It cannot fail with these options.
		w.zstd, _ = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(1),
			zstd.WithEncoderCRC(false), zstd.WithWindowSize(wire.MaxPayload))
	}
	return w
}

// send sends a batch.
func (w *worker) send(ctx context.Context, batch []memory.Range, byName bool) error {
	w.zero, w.named, w.dup, w.raw = w.zero[:0], w.named[:0], w.dup[:0], w.raw[:0]
	w.nZero, w.nNamed, w.nDup, w.nRaw, w.nAsked, w.open = 0, 0, 0, 0, 0, -1
	pages := uint64(0)
	for _, r := range batch {
		view, err := w.s.mem.View(r.Start, r.Size)
		if err != nil {
			return err
		}
		w.sort(r, view, byName)
		pages += r.Size >> memory.PageShift
	}
	if err := w.frames(ctx); err != nil {
		return err
	}
	w.s.traffic.roundDone.Add(pages)
	w.s.done.Add(pages << memory.PageShift)
	return nil
}

// sort finds out how each page of a range travels.
func (w *worker) sort(r memory.Range, view []byte, byName bool) {
	first := r.Start.GFN()
	if n := len(view) >> memory.PageShift; byName {
		w.names = append(w.names[:0], make([]names.Name, n)...)
		w.s.recorded.Load(w.names, first)
	}
	for i := 0; i < len(view); i += memory.PageSize {
		page, gfn := view[i:i+memory.PageSize:i+memory.PageSize], first+memory.GFN(i>>memory.PageShift)
		switch {
		case isZero(page):
			w.zero = extend(w.zero, gfn)
			w.nZero++
		case byName && w.name(gfn, w.names[i>>memory.PageShift], page):
		default:
			if w.s.asked.Has(gfn.GPA()) {
				w.nAsked++
			}
			w.addRaw(gfn)
		}
	}
}

// extend adds a page to runs, of which the last may take it in.
func extend(runs []byte, gfn memory.GFN) []byte {
	if n := len(runs) - wire.RunSize; n >= 0 {
		last := wire.Run{GFN: binary.LittleEndian.Uint64(runs[n:]), Count: binary.LittleEndian.Uint32(runs[n+8:])}
		if last.GFN+uint64(last.Count) == uint64(gfn) {
			binary.LittleEndian.PutUint32(runs[n+8:], last.Count+1)
			return runs
		}
	}
	return wire.AppendRun(runs, wire.Run{GFN: uint64(gfn), Count: 1})
}

// name sends a page by its name, if it has one that the destination can look up
// and that was not used before.
func (w *worker) name(gfn memory.GFN, n names.Name, page []byte) bool {
	switch n.Kind() {
	case names.Block:
		if l := int(n.Layer()); l >= len(w.s.held) || !w.s.held[l] || w.s.named.Has(gfn.GPA()) {
			return false
		}
		w.addName(uint64(gfn), n, w.s.digests.sum(page))
	case names.Page:
		if n.Number() == uint64(gfn) || w.s.named.Has(gfn.GPA()) {
			return false
		}
		w.dup = wire.AppendDuplicate(w.dup, wire.Duplicate{GFN: uint64(gfn), Of: n.Number(), Digest: w.s.digests.sum(page)})
		w.nDup++
	default:
		return false
	}
	w.s.named.Add(gfn.GPA(), memory.PageSize)
	return true
}

// addName adds a page to the names, to the last record if it continues it.
func (w *worker) addName(gfn uint64, n names.Name, digest [wire.DigestSize]byte) {
	w.nNamed++
	if w.open >= 0 && gfn == w.openGFN && n.Number() == w.openBlock && uint16(n.Layer()) == w.openLayer {
		w.openSize++
		wire.SetNameCount(w.named, w.open, w.openSize)
	} else {
		w.open, w.openLayer, w.openSize = len(w.named), uint16(n.Layer()), 1
		w.named = wire.AppendName(w.named, gfn, n.Number(), w.openLayer, 1)
	}
	w.openGFN, w.openBlock = gfn+1, n.Number()+1
	w.named = append(w.named, digest[:]...)
}

// addRaw adds a page to those that travel as bytes.
func (w *worker) addRaw(gfn memory.GFN) {
	w.nRaw++
	if n := len(w.raw); n > 0 && w.raw[n-1].End() == gfn.GPA() {
		w.raw[n-1].Size += memory.PageSize
		return
	}
	w.raw = append(w.raw, memory.Range{Start: gfn.GPA(), Size: memory.PageSize})
}

// frames makes the frames of the batch and writes them.
func (w *worker) frames(ctx context.Context) error {
	w.out = w.out[:0]
	w.frame(wire.TypeZero, w.zero, kindZero, w.nZero)
	w.frame(wire.TypeNames, w.named, kindNamed, w.nNamed)
	w.frame(wire.TypeDuplicates, w.dup, kindDuplicate, w.nDup)
	if w.nRaw == 0 {
		return w.write(ctx, w.out, false)
	}
	if w.s.o.Trusted && w.link.vectors && w.zstd == nil {
		start := w.beginBytes()
		w.finishBytes(start, len(w.out), wire.TypeRaw, w.nRaw<<memory.PageShift, 0)
		return w.write(ctx, w.out, true)
	}
	if err := w.addBytes(); err != nil {
		return err
	}
	return w.write(ctx, w.out, false)
}

// frame adds a frame of a head, if it says anything.
func (w *worker) frame(t wire.Type, head []byte, k kind, pages uint64) {
	if pages == 0 {
		return
	}
	start := len(w.out)
	w.out = append(wire.Begin(w.out), head...)
	w.out = wire.Finish(w.out, start, t, 0, 0)
	w.s.traffic.add(k, pages, len(w.out)-start)
}

// beginBytes adds the beginning of a frame of bytes, and returns where.
func (w *worker) beginBytes() int {
	start := len(w.out)
	w.out = wire.BeginBytes(w.out)
	for _, r := range w.raw {
		w.out = wire.AppendRun(w.out, wire.Run{GFN: uint64(r.Start.GFN()), Count: uint32(r.Size >> memory.PageShift)})
	}
	return start
}

// finishBytes fills in the header of a frame of bytes, whose head ends at end.
func (w *worker) finishBytes(start, end int, t wire.Type, payload int, sum uint64) {
	wire.FinishBytes(w.out[:end], start, t, payload, sum, !w.s.o.Trusted)
	k, size := kindRaw, end-start+payload
	if t == wire.TypeZstd {
		k = kindZstd
	}
	w.s.traffic.add(k, uint64(w.nRaw), size)
	w.s.traffic.add(kindAsked, uint64(w.nAsked), size*w.nAsked/w.nRaw)
}

// addBytes adds a frame with a copy of the pages that travel as bytes, compressed
// if that is wanted and pays.
func (w *worker) addBytes() error {
	start := w.beginBytes()
	end, t := len(w.out), wire.TypeRaw
	var err error
	if w.zstd == nil {
		w.out, err = w.copyRaw(w.out)
	} else if w.copied, err = w.copyRaw(w.copied[:0]); err == nil {
		t = wire.TypeZstd
		w.out = w.zstd.EncodeAll(w.copied, w.out)
		if len(w.out)-end > len(w.copied)-len(w.copied)/16 {
			t, w.out = wire.TypeRaw, append(w.out[:end], w.copied...)
		}
	}
	if err != nil {
		return err
	}
	sum, payload := uint64(0), w.out[end:]
	if !w.s.o.Trusted {
		sum = xxh3.Hash(payload)
	}
	w.finishBytes(start, end, t, len(payload), sum)
	return nil
}

// copyRaw appends the pages that travel as bytes.
func (w *worker) copyRaw(to []byte) ([]byte, error) {
	for _, r := range w.raw {
		view, err := w.s.mem.View(r.Start, r.Size)
		if err != nil {
			return nil, err
		}
		to = append(to, view...)
	}
	return to, nil
}

// write writes frames, and behind them pages straight from guest memory.
func (w *worker) write(ctx context.Context, out []byte, pages bool) error {
	if len(out) == 0 {
		return nil
	}
	size := len(out)
	w.vectors = append(w.vectors[:0], out)
	if pages {
		for _, r := range w.raw {
			view, err := w.s.mem.View(r.Start, r.Size)
			if err != nil {
				return err
			}
			w.vectors, size = append(w.vectors, view), size+len(view)
		}
	}
	if !w.s.stopped.Load() {
		if err := w.s.limiter.wait(ctx, size); err != nil {
			return err
		}
	}
	w.link.mu.Lock()
	defer w.link.mu.Unlock()
	if !pages {
		if err := w.link.write(out); err != nil {
			return lost(err)
		}
		return nil
	}
	sending := w.vectors // WriteTo consumes it
	if err := w.link.writeAll(&sending); err != nil {
		return lost(err)
	}
	return nil
}
