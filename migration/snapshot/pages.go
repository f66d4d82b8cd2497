package snapshot

import (
	"errors"
	"fmt"
	"sync"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
)

// Pages reads pages for a lazy restore, from any goroutine. It implements
// [memory.PageSource].
type Pages struct {
	mu    sync.Mutex // guards what follows
	s     *Snapshot  // nil when it is closed
	free  []*Reader
	users sync.WaitGroup // who reads
}

// freeReaders bounds the readers that are kept, and with them what they hold.
const freeReaders = 4

// Pages returns what reads the snapshot's memory.
func (s *Snapshot) Pages() *Pages { return &Pages{s: s} }

// Close gives back what is held for reading, when nobody reads any more. Nothing
// can be read after it.
func (p *Pages) Close() {
	p.mu.Lock()
	for _, r := range p.free {
		r.Close()
	}
	p.free, p.s = nil, nil
	p.mu.Unlock()
	p.users.Wait()
}

var errClosed = errors.New("the snapshot is closed")

// begin returns the snapshot and counts its user until done is called. It is nil
// when the snapshot is closed.
func (p *Pages) begin() *Snapshot {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.s != nil {
		p.users.Add(1)
	}
	return p.s
}

// ReadPages implements [memory.PageSource]. The bytes are proven as those of
// [Reader.ReadPage] are.
func (p *Pages) ReadPages(gfn memory.GFN, dst []byte) error {
	s := p.begin()
	if s == nil {
		return errClosed
	}
	defer p.users.Done()
	r := p.reader(s)
	defer p.keep(r)
	return r.ReadPages(gfn, dst)
}

func (p *Pages) reader(s *Snapshot) *Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
	if n := len(p.free); n > 0 {
		r := p.free[n-1]
		p.free = p.free[:n-1]
		return r
	}
	return s.NewReader()
}

func (p *Pages) keep(r *Reader) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.s == nil || len(p.free) == freeReaders {
		r.Close()
		return
	}
	p.free = append(p.free, r)
}

// rowPages is how many pages are read together that are stored as they are: to
// read one more costs less than the fault on it would.
const rowPages = 16

// Row implements [memory.PageSource]: the neighbours of a page, and of one that is
// compressed those that stand in its frame.
func (p *Pages) Row(gfn memory.GFN) memory.Range {
	row := memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
	s := p.begin()
	if s == nil {
		return row
	}
	defer p.users.Done()
	i := s.find(gfn)
	if i < 0 {
		return row
	}
	if f := s.run(i); f.packed() {
		each := uint64(f.src.p.framePages)
		slot := f.Number + uint64(gfn-f.Start)
		first := max(slot/each*each, f.Number)
		f.Run = f.cut(f.Start+memory.GFN(first-f.Number), f.Start+memory.GFN((slot/each+1)*each-f.Number))
		return f.Range()
	}
	start, end := gfn&^(rowPages-1), gfn&^(rowPages-1)+rowPages
	first, last := i, i
	for first > 0 && s.run(first).Start > start && s.run(first-1).End() == s.run(first).Start && !s.run(first-1).packed() {
		first--
	}
	for last+1 < s.runs() && s.run(last).End() < end && s.run(last+1).Start == s.run(last).End() && !s.run(last+1).packed() {
		last++
	}
	start, end = max(start, s.run(first).Start), min(end, s.run(last).End())
	return memory.Range{Start: start.GPA(), Size: uint64(end-start) * memory.PageSize}
}

// packed reports whether the pages of a run are stored in frames.
func (f flatRun) packed() bool { return f.Kind == Unique && f.src.p.compressed() }

// ReadPages fills dst, whole pages that lie in RAM, with what the pages from gfn
// on held. The bytes are proven.
func (r *Reader) ReadPages(gfn memory.GFN, dst []byte) error {
	if len(dst)%memory.PageSize != 0 {
		return fmt.Errorf("read %d bytes from page %s on: %w", len(dst), gfn, memory.ErrOutOfRange)
	}
	for len(dst) > 0 {
		f, ok := r.s.runOf(gfn)
		if !ok {
			return fmt.Errorf("read page %s: %w", gfn, memory.ErrOutOfRange)
		}
		f.Run = f.cut(gfn, gfn+memory.GFN(len(dst)/memory.PageSize))
		n := f.Pages * memory.PageSize
		if err := r.read(f, dst[:n]); err != nil {
			return fmt.Errorf("read %d pages from %s on: %w", f.Pages, gfn, err)
		}
		gfn, dst = f.End(), dst[n:]
	}
	return nil
}

// EachBlock calls visit with the runs of memory that equal blocks of layers, in
// ascending order, until it returns false. A run's layer is one of the snapshot
// that is named with it, this one or an ancestor.
func (s *Snapshot) EachBlock(visit func(r Run, of *Snapshot) bool) {
	if s.parent == nil {
		for _, i := range s.p.blocks {
			if !visit(s.p.runs[i], s) {
				return
			}
		}
		return
	}
	for i := range s.runs() {
		if f := s.run(i); f.Kind == Block && !visit(f.Run, f.src) {
			return
		}
	}
}

// LayerStamp returns the stamp that the file of a layer has now. It opens it.
func (s *Snapshot) LayerStamp(i int) (layer.Stamp, error) {
	f, err := s.layer(i)
	if err != nil {
		return layer.Stamp{}, err
	}
	return f.Stamp()
}
