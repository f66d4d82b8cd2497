package live

import (
	"bytes"
	"cmp"
	"slices"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// Reads of layers: pages that lie next to each other, or almost, on disk are read
// together.
const (
	maxRead = 1 << 20  // bytes
	maxGap  = 16 << 10 // bytes that nobody asked for
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

// prover reads blocks and copies those that are proven into memory.
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
		if r.Layer != runs[0].Layer || last-begin > maxRead/memory.PageSize || r.Block > end+maxGap/memory.PageSize {
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

// copy copies the pages of a run that its blocks prove, as many at a time as there
// are next to each other.
func (p *prover) copy(r wire.Name, blocks []byte) error {
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
			copy(b, blocks[i<<memory.PageShift:])
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
