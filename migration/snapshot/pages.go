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
	mu   sync.Mutex // guards what follows
	s    *Snapshot  // nil when it is closed
	free []*Reader
}

// freeReaders bounds the readers that are kept, and with them what they hold.
const freeReaders = 4

// Pages returns what reads the snapshot's memory.
func (s *Snapshot) Pages() *Pages { return &Pages{s: s} }

// Close gives back what is held for reading. Nothing can be read any more.
func (p *Pages) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.free {
		r.Close()
	}
	p.free, p.s = nil, nil
}

var errClosed = errors.New("the snapshot is closed")

// ReadPages implements [memory.PageSource]. The bytes are proven as those of
// [Reader.ReadPage] are.
func (p *Pages) ReadPages(gfn memory.GFN, dst []byte) error {
	r := p.reader()
	if r == nil {
		return errClosed
	}
	defer p.keep(r)
	return r.ReadPages(gfn, dst)
}

// reader returns a reader, nil when the snapshot is closed.
func (p *Pages) reader() *Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.s == nil {
		return nil
	}
	if n := len(p.free); n > 0 {
		r := p.free[n-1]
		p.free = p.free[:n-1]
		return r
	}
	return p.s.NewReader()
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

// Row implements [memory.PageSource]: pages that are stored one after the other,
// in one frame where they are compressed.
func (p *Pages) Row(gfn memory.GFN) memory.Range {
	p.mu.Lock()
	s := p.s
	p.mu.Unlock()
	if s == nil {
		return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
	}
	f, ok := s.runOf(gfn)
	if !ok || f.Kind != Unique && f.Kind != Block {
		return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
	}
	if f.Kind == Unique && f.src.p.compressed() {
		each := uint64(f.src.p.framePages)
		slot := f.Number + uint64(gfn-f.Start)
		first := max(slot/each*each, f.Number)
		f.Run = f.cut(f.Start+memory.GFN(first-f.Number), f.Start+memory.GFN((slot/each+1)*each-f.Number))
	}
	return f.Range()
}

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
