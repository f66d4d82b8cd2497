package live

import (
	"bytes"
	"cmp"
	"slices"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// Reads of layers: a long run of pages is read to where it belongs, shorter ones
// that lie next to each other on disk, or almost, are read together and copied.
const (
	maxRead  = 1 << 20  // bytes
	maxGap   = 16 << 10 // bytes that nobody asked for
	ownPages = 4        // from how many pages on a run is read by itself
)

// start starts the provers.
func (in *incoming) start() {
	for range proverCount() {
		in.provers.Go(func() {
			p := prover{in: in, buf: make([]byte, maxRead)}
			for head := range in.jobs {
				if in.r.run.Err() == nil {
					if err := p.prove(head); err != nil {
						in.r.end(err)
					}
				}
				in.free.Put(&head)
				in.pending.Done()
			}
		})
	}
}

// names hands names to the provers. It waits while they have too much to do.
func (in *incoming) names(f wire.Frame) error {
	err := wire.ParseNames(f, func(n wire.Name) error {
		if _, err := rangeOf(in.mem, n.Run); err != nil {
			return err
		}
		if int(n.Layer) >= len(in.layers) || in.layers[n.Layer] == nil {
			return &wire.Error{Type: f.Type, What: "a layer that is not here"}
		}
		return nil
	})
	if err != nil {
		return err
	}
	var head []byte
	if b, ok := in.free.Get().(*[]byte); ok {
		head = (*b)[:0]
	}
	in.pending.Add(1)
	in.jobs <- append(head, f.Head...)
	return nil
}

// prover reads blocks into memory and proves them.
type prover struct {
	in   *incoming
	buf  []byte
	runs []wire.Name
}

// prove deals with the names of one frame.
func (p *prover) prove(head []byte) error {
	p.runs = p.runs[:0]
	// The frame was parsed before.
	err := wire.ParseNames(wire.Frame{Type: wire.TypeNames, Head: head}, func(n wire.Name) error {
		for n.Count > maxRead/memory.PageSize {
			first := n
			first.Count = maxRead / memory.PageSize
			first.Digests = n.Digests[:first.Count*wire.DigestSize]
			p.runs = append(p.runs, first)
			n.GFN, n.Block = n.GFN+uint64(first.Count), n.Block+uint64(first.Count)
			n.Count, n.Digests = n.Count-first.Count, n.Digests[len(first.Digests):]
		}
		p.runs = append(p.runs, n)
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(p.runs, func(a, b wire.Name) int {
		return cmp.Or(cmp.Compare(a.Layer, b.Layer), cmp.Compare(a.Block, b.Block))
	})
	for rest := p.runs; len(rest) > 0; {
		if rest[0].Count >= ownPages {
			if err := p.readInPlace(rest[0]); err != nil {
				return err
			}
			rest = rest[1:]
			continue
		}
		n := together(rest)
		if err := p.read(rest[:n]); err != nil {
			return err
		}
		rest = rest[n:]
	}
	return nil
}

// together returns how many of the runs, which are sorted, are read at once.
func together(runs []wire.Name) int {
	begin, end := runs[0].Block, runs[0].Block+uint64(runs[0].Count)
	for i, r := range runs[1:] {
		last := max(end, r.Block+uint64(r.Count))
		if r.Layer != runs[0].Layer || r.Count >= ownPages || last-begin > maxRead/memory.PageSize || r.Block > end+maxGap/memory.PageSize {
			return i + 1
		}
		end = last
	}
	return len(runs)
}

// read reads the blocks of runs that lie close together, and proves them. Blocks
// that cannot be read prove nothing: their pages come as bytes.
func (p *prover) read(runs []wire.Name) error {
	begin, end := runs[0].Block, uint64(0)
	for _, r := range runs {
		end = max(end, r.Block+uint64(r.Count))
	}
	buf := p.buf[:(end-begin)<<memory.PageShift]
	n, _ := p.in.layers[runs[0].Layer].ReadAt(buf, int64(begin)<<memory.PageShift)
	buf = buf[:n>>memory.PageShift<<memory.PageShift]
	for _, r := range runs {
		off := min((r.Block-begin)<<memory.PageShift, uint64(len(buf)))
		blocks := buf[off:min(off+uint64(r.Count)<<memory.PageShift, uint64(len(buf)))]
		if err := p.copy(r, blocks); err != nil {
			return err
		}
	}
	return nil
}

// readInPlace reads the blocks of a run to where its pages belong and proves them
// there. What is not proven stays there until the source has sent its bytes, or
// that it is zero: so the pages count as filled from here on.
func (p *prover) readInPlace(r wire.Name) error {
	to := memory.Range{Start: memory.GFN(r.GFN).GPA(), Size: uint64(r.Count) << memory.PageShift}
	b, err := p.in.mem.Writable(to.Start, to.Size)
	if err != nil {
		return err
	}
	p.in.filled.Add(to.Start, to.Size)
	n, _ := p.in.layers[r.Layer].ReadAt(b, int64(r.Block)<<memory.PageShift)
	return p.settle(r, b[:n>>memory.PageShift<<memory.PageShift], func(int, []byte) {})
}

// copy copies the pages of a run that its blocks prove.
func (p *prover) copy(r wire.Name, blocks []byte) error {
	return p.settle(r, blocks, func(i int, to []byte) { copy(to, blocks[i<<memory.PageShift:]) })
}

// settle notes which pages of a run its blocks prove, as many at a time as there
// are next to each other, after put has put those from the i-th on into memory. The
// others are wanted.
func (p *prover) settle(r wire.Name, blocks []byte, put func(i int, to []byte)) error {
	first := memory.GFN(r.GFN).GPA()
	for i, count := 0, int(r.Count); i < count; {
		good := i
		for good < count && p.holds(r, blocks, good) {
			good++
		}
		if good > i {
			to := memory.Range{Start: first + memory.GPA(i<<memory.PageShift), Size: uint64(good-i) << memory.PageShift}
			b, err := p.in.mem.Writable(to.Start, to.Size)
			if err != nil {
				return err
			}
			put(i, b)
			p.in.arrived(to, kindNamed)
			if l, ok := p.in.layers[r.Layer].(Learner); ok {
				l.Learn(to, r.Block+uint64(i))
			}
		}
		if i = good; i < count {
			p.in.want(memory.Range{Start: first + memory.GPA(i<<memory.PageShift), Size: memory.PageSize})
			i++
		}
	}
	return nil
}

// holds tells whether block i of a run was read and has the digest of its page.
func (p *prover) holds(r wire.Name, blocks []byte, i int) bool {
	end := (i + 1) << memory.PageShift
	if end > len(blocks) {
		return false
	}
	return p.in.r.proves(blocks[end-memory.PageSize:end], [wire.DigestSize]byte(r.Digests[i*wire.DigestSize:]))
}

// proves tells whether a page has a digest.
func (r *receiver) proves(page []byte, digest [wire.DigestSize]byte) bool {
	sum := r.digests.sum(page)
	return bytes.Equal(sum[:], digest[:])
}

// progress tells of a part of a round.
func (r *receiver) progress(pages uint64) {
	r.events.tell(false, r.traffic(), func(e *Event) { e.Done = pages << memory.PageShift })
}
