package live

import (
	"context"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// Arrivals is what the source of pages given to [Arrival].Construct is besides a
// [memory.PageSource]: it is told when no page is missing any more, and lets the
// VM's old host go.
type Arrivals interface{ Arrived() }

// Bounds of post-copy.
const (
	// rowPages is how many pages are asked for together.
	rowPages = 64
	// aheadPages is how many more are asked for before somebody needs them, and
	// kept: for a way that is long.
	aheadPages = 256
)

// puller is where pages come from that were missing at the commit: the source,
// asked over whatever connection there is. Without one, whoever asks waits.
//
//	ReadPages --> request --> [link] --> source
//	    ^                                  |
//	    +---- deliver <---- pages <--------+
type puller struct {
	regions []memory.Range

	mu      sync.Mutex
	link    *link // nil while there is no connection
	missing *memory.PageSet
	asked   map[memory.GFN]bool // and not come; true if somebody waits
	waits   map[memory.GFN][]slot
	ahead   map[memory.GFN][]byte // came before somebody asked
	number  uint32
	err     error // nothing comes any more

	arrived chan struct{} // closed when nothing is missing any more
	once    sync.Once
	closed  chan struct{}
}

// fetch is one call of ReadPages.
type fetch struct {
	left int // pages
	done chan struct{}
}

// slot is where a page goes.
type slot struct {
	f   *fetch
	dst []byte
}

func newPuller(mem *memory.Space, missing *memory.PageSet) *puller {
	p := &puller{
		missing: mem.NewPageSet(), asked: map[memory.GFN]bool{}, waits: map[memory.GFN][]slot{},
		ahead: map[memory.GFN][]byte{}, arrived: make(chan struct{}), closed: make(chan struct{}),
	}
	for _, r := range mem.Regions() {
		p.regions = append(p.regions, r.Range)
	}
	for r := range missing.Runs() {
		p.missing.Add(r.Start, r.Size)
	}
	return p
}

// Arrived implements [Arrivals].
func (p *puller) Arrived() { p.once.Do(func() { close(p.arrived) }) }

// Row implements [memory.PageSource].
func (p *puller) Row(gfn memory.GFN) memory.Range {
	row := memory.Range{Start: (gfn &^ (rowPages - 1)).GPA(), Size: rowPages << memory.PageShift}
	for _, r := range p.regions {
		if r.Contains(gfn.GPA(), 1) {
			start, end := max(row.Start, r.Start), min(row.End(), r.End())
			return memory.Range{Start: start, Size: uint64(end - start)}
		}
	}
	return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
}

// ReadPages implements [memory.PageSource]. It waits as long as there is no
// connection.
func (p *puller) ReadPages(gfn memory.GFN, dst []byte) error {
	f := &fetch{done: make(chan struct{})}
	p.mu.Lock()
	if p.err != nil {
		p.mu.Unlock()
		return p.err
	}
	var need []memory.GFN
	for i := 0; i < len(dst); i, gfn = i+memory.PageSize, gfn+1 {
		if b, ok := p.ahead[gfn]; ok {
			copy(dst[i:], b)
			delete(p.ahead, gfn)
			continue
		}
		f.left++
		p.waits[gfn] = append(p.waits[gfn], slot{f, dst[i : i+memory.PageSize]})
		if _, under := p.asked[gfn]; !under {
			need = append(need, gfn)
		}
		p.asked[gfn] = true
	}
	done := f.left == 0
	p.ask(need)
	p.ask(p.next(gfn))
	p.mu.Unlock()
	if done {
		return nil
	}
	select {
	case <-f.done:
		return nil
	case <-p.closed:
		return p.err
	}
}

// next chooses pages from gfn on that are missing, to have them before somebody
// asks, if there is room.
//
// Precondition: p.mu is held.
func (p *puller) next(gfn memory.GFN) (pages []memory.GFN) {
	room := aheadPages - len(p.ahead) - len(p.asked)
	for end := gfn + 4*aheadPages; gfn < end && len(pages) < room; gfn++ {
		if _, under := p.asked[gfn]; under || !p.missing.Has(gfn.GPA()) {
			continue
		}
		if _, here := p.ahead[gfn]; !here {
			pages = append(pages, gfn)
			p.asked[gfn] = false
		}
	}
	if len(pages) < rowPages && len(p.ahead)+len(p.asked) > rowPages {
		// Not worth a question yet.
		for _, gfn := range pages {
			delete(p.asked, gfn)
		}
		return nil
	}
	return pages
}

// ask asks for pages, in ascending order. An error ends the session, and they are
// asked for again on the next connection.
//
// Precondition: p.mu is held.
func (p *puller) ask(pages []memory.GFN) {
	for len(pages) > 0 && p.link != nil {
		n := min(len(pages), wire.MaxBatch)
		var runs []byte
		for _, gfn := range pages[:n] {
			runs = extend(runs, gfn)
		}
		pages = pages[n:]
		p.number++
		frame := append(wire.AppendRequest(wire.Begin(nil), p.number), runs...)
		p.link.mu.Lock()
		_ = p.link.write(wire.Finish(frame, 0, wire.TypeRequest, 0, 0))
		p.link.mu.Unlock()
	}
}

// attach goes on with a connection: what is waited for is asked for again.
func (p *puller) attach(l *link) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.link = l
	var all []memory.GFN
	for gfn, waited := range p.asked {
		if !waited {
			delete(p.asked, gfn)
			continue
		}
		all = append(all, gfn)
	}
	slices.Sort(all)
	p.ask(all)
}

// detach lets whoever asks wait for the next connection.
func (p *puller) detach() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.link = nil
}

// close ends it: who waits hears the error.
func (p *puller) close(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.err == nil {
		p.err = err
		close(p.closed)
	}
}

// take takes a frame of pages that were asked for.
func (p *puller) take(in *incoming, from *wire.Reader, f wire.Frame) error {
	switch f.Type {
	case wire.TypeZero:
		runs, pages, err := wire.ParseRuns(f)
		if err != nil {
			return err
		}
		if pages > wire.MaxBatch {
			return fmt.Errorf("%d pages at once were not asked for", pages)
		}
		p.deliver(runs, make([]byte, pages<<memory.PageShift))
		return nil
	case wire.TypeRaw, wire.TypeZstd:
		return in.unpackBytes(from, f, func(head wire.Bytes, bytes []byte) error {
			p.deliver(head.Runs, bytes)
			return nil
		})
	}
	return fmt.Errorf("the source sent %q in post-copy", f.Type)
}

// deliver hands pages to who waits for them.
func (p *puller) deliver(runs wire.Runs, bytes []byte) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for i := range runs.Len() {
		run := runs.At(i)
		for gfn := memory.GFN(run.GFN); gfn < memory.GFN(run.GFN)+memory.GFN(run.Count); gfn++ {
			p.page(gfn, bytes[:memory.PageSize])
			bytes = bytes[memory.PageSize:]
		}
	}
}

// page hands out one page. What nobody asked for is dropped.
//
// Precondition: p.mu is held.
func (p *puller) page(gfn memory.GFN, bytes []byte) {
	waited, under := p.asked[gfn]
	if !under {
		return
	}
	delete(p.asked, gfn)
	p.missing.Remove(gfn.GPA(), memory.PageSize)
	if !waited {
		p.ahead[gfn] = slices.Clone(bytes)
		return
	}
	for _, s := range p.waits[gfn] {
		copy(s.dst, bytes)
		if s.f.left--; s.f.left == 0 {
			close(s.f.done)
		}
	}
	delete(p.waits, gfn)
}

// errGivenUp is what who waits for pages hears when the VM is ended.
var errGivenUp = errors.New("pages that are missing were given up")

// errAllArrived is what who asks for a page hears that came already: two may ask for
// one page, and the second of them when nobody serves pages any more.
var errAllArrived = errors.New("all pages have arrived")

// pull serves the guest that runs already with what is missing, until nothing is
// or the context ends. Connections may come and go.
func (r *receiver) pull(ctx context.Context) error {
	r.phase(PhasePull)
	for {
		select {
		case <-r.puller.arrived:
			if r.say(&wire.Pulled{}) == nil {
				return nil
			}
		case <-ctx.Done():
			return fmt.Errorf("%w: %w", errGivenUp, context.Cause(ctx))
		case <-r.run.Done():
		}
		err := context.Cause(r.run)
		r.puller.detach()
		r.disconnect(err)
		r.tellPull("the guest waits for pages, and the source has to connect again: " + err.Error())
		r.o.Log.Warn("the guest waits for pages until the source connects again", "vm", r.offer.Name, "err", err)
		if again, err := r.reconnected(ctx); !again {
			return err
		}
		r.tellPull("")
	}
}

func (r *receiver) tellPull(trouble string) {
	r.events.tell(true, r.traffic(), func(e *Event) { e.Error = trouble })
}

// reconnected waits until the source is here again. When nothing is missing any
// more, it is to hear that, but not waited for without end.
func (r *receiver) reconnected(ctx context.Context) (bool, error) {
	var alone <-chan time.Time
	for arrived := r.puller.arrived; ; {
		select {
		case conn := <-r.again:
			r.resume(ctx, conn)
			return true, nil
		case <-arrived:
			arrived, alone = nil, time.After(r.o.Stall)
		case <-alone:
			return false, nil
		case <-ctx.Done():
			return false, fmt.Errorf("%w: %w", errGivenUp, context.Cause(ctx))
		}
	}
}

// resume goes on with a new connection.
func (r *receiver) resume(ctx context.Context, conn net.Conn) {
	s := newSession(ctx, r.o.Stall)
	s.token, s.control = r.id, newLink(conn, &s.flow)
	s.flow.in.Store(r.flow.in.Load())
	s.flow.out.Store(r.flow.out.Load())
	s.add(s.control)
	s.setTick(min(r.o.Stall, r.patience))
	r.session = s
	r.current.Store(s)
	s.start(r.decode)
	r.puller.attach(s.control)
}

// disconnect ends the session and its connections.
func (r *receiver) disconnect(err error) {
	r.finish(err)
	r.closeConns()
	_ = r.control.conn.Close()
}
