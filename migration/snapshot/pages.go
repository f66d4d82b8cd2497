package snapshot

import (
	"fmt"
	"sync"

	"ditto.vm/memory"
)

// Pages reads pages for a lazy restore, from any goroutine. It implements
// [memory.PageSource].
type Pages struct {
	s *Snapshot

	mu   sync.Mutex // guards what follows
	free []*Reader
	done bool
}

// freeReaders bounds the readers that are kept, and with them what they hold.
const freeReaders = 4

// Pages returns what reads the snapshot's memory.
func (s *Snapshot) Pages() *Pages { return &Pages{s: s} }

// Close gives back what is held for reading.
func (p *Pages) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, r := range p.free {
		r.Close()
	}
	p.free, p.done = nil, true
}

// ReadPages implements [memory.PageSource]. The bytes are proven as those of
// [Reader.ReadPage] are.
func (p *Pages) ReadPages(gfn memory.GFN, dst []byte) error {
	r := p.reader()
	defer p.keep(r)
	return r.ReadPages(gfn, dst)
}

func (p *Pages) reader() *Reader {
	p.mu.Lock()
	defer p.mu.Unlock()
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
	if p.done || len(p.free) == freeReaders {
		r.Close()
		return
	}
	p.free = append(p.free, r)
}

// Row implements [memory.PageSource]: pages that are stored one after the other,
// in one frame where they are compressed.
func (p *Pages) Row(gfn memory.GFN) memory.Range {
	f, ok := p.s.flatAt(gfn)
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

// flatAt returns the run of memory that holds a page.
func (s *Snapshot) flatAt(gfn memory.GFN) (flatRun, bool) {
	i := findRun(len(s.flat), func(i int) Run { return s.flat[i].Run }, gfn)
	if i < 0 {
		return flatRun{}, false
	}
	return s.flat[i], true
}

// ReadPages fills dst, whole pages that lie in RAM, with what the pages from gfn
// on held. The bytes are proven.
func (r *Reader) ReadPages(gfn memory.GFN, dst []byte) error {
	if len(dst)%memory.PageSize != 0 {
		return fmt.Errorf("read %d bytes from page %s on: %w", len(dst), gfn, memory.ErrOutOfRange)
	}
	for len(dst) > 0 {
		f, ok := r.s.flatAt(gfn)
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
