package live

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/migration/wire"
)

// receiver is the state machine of the destination, for one migration.
//
//	hello, offer -> accept -> rounds -> sections, prepare -> ready -> commit -> run
//	  |               |         |            |                 |        |
//	  +- next source  +---------+------------+-----------------+        recorded:
//	                    abandoned: nothing runs here, and never will    it is ours
type receiver struct {
	*session
	o      ReceiveOptions
	began  time.Time
	result Result
	events events

	offer    Offer
	digests  digester
	arrival  Arrival
	mem      *memory.Space
	sections []state.Section

	// expected is how many data connections the source announced; they come when
	// the offer was accepted.
	conns struct {
		sync.Mutex
		open     bool
		reserved []bool
	}
	readers  sync.WaitGroup
	barriers chan uint32 // from data connections

	// Of post-copy.
	missing  *memory.PageSet // what comes later
	puller   *puller
	pulling  atomic.Pointer[puller] // from the preparation on
	again    chan net.Conn          // the source, when it connects again
	current  atomic.Pointer[session]
	patience time.Duration // of the source
	id       Token

	round     uint32 // the last that ended
	stoppedAt time.Time
	pages     *incoming
	images    []Image // of disks that are copied
	target    atomic.Pointer[blockTarget]
	blockBuf  []byte       // of the control reader
	decided   atomic.Int32 // an Outcome
}

func newReceiver(ctx context.Context, conn net.Conn, token Token, o ReceiveOptions) *receiver {
	r := &receiver{session: newSession(ctx, o.Stall), o: o, began: time.Now()}
	r.token, r.id, r.result.Token = token, token, token
	r.again = make(chan net.Conn, 1)
	r.current.Store(r.session)
	r.control = newLink(conn, &r.flow)
	r.add(r.control)
	r.events.init(o.Events)
	r.decided.Store(int32(OutcomePending))
	return r
}

// outcome is what is told of this migration while it is under way.
func (r *receiver) outcome() Outcome { return Outcome(r.decided.Load()) }

// receive does all of it, and says whether a VM was offered: without, the
// receiver waits for the next source.
func (r *receiver) receive(ctx context.Context, vm DestinationVM) (began bool, err error) {
	err = r.hello()
	if err != nil {
		r.leave(err)
		return false, err
	}
	r.events.begin(r.offer.Name)
	r.phase(PhaseConnect)
	err = r.arrive(vm)
	if err == nil {
		err = r.commit()
	}
	if err == nil && r.puller != nil {
		err = r.pull(ctx)
	}
	r.count()
	r.leave(err)
	end := PhaseDone
	if err != nil {
		end = PhaseFailed
	}
	r.events.tell(true, r.traffic(), func(e *Event) {
		e.Phase = end
		if err != nil {
			e.Error = err.Error()
		}
	})
	return true, err
}

// hello reads the greeting and the offer, within the limit of time that is set
// already.
func (r *receiver) hello() error {
	f, err := r.control.in.Next()
	if err != nil {
		return lost(err)
	}
	var hello wire.Hello
	if err := wire.Parse(f, &hello); err != nil {
		return err
	}
	r.digests = digester{kind: hello.Digests, seed: hello.Seed}
	r.conns.reserved = make([]bool, hello.Connections)
	r.barriers = make(chan uint32, len(r.conns.reserved))
	r.patience = time.Duration(hello.StallMillis) * time.Millisecond
	r.setTick(min(r.o.Stall, r.patience))
	if f, err = r.control.in.Next(); err != nil {
		return lost(err)
	}
	var offer wire.Offer
	if err := wire.Parse(f, &offer); err != nil {
		return err
	}
	if err := json.Unmarshal(offer.JSON, &r.offer); err != nil {
		return fmt.Errorf("the offer: %w", err)
	}
	if err := checkOffer(r.offer); err != nil {
		return fmt.Errorf("the offer: %w", err)
	}
	r.result.Offer = r.offer
	return r.control.conn.SetDeadline(time.Time{})
}

// arrive receives memory and state and makes the VM.
func (r *receiver) arrive(vm DestinationVM) error {
	r.start(r.decode)
	if r.o.Begin != nil {
		if err := r.o.Begin(r.token); err != nil {
			return &refusal{err}
		}
	}
	arrival, err := vm.Prepare(r.run, r.offer)
	if err != nil {
		return &refusal{r.cause(err)}
	}
	r.arrival, r.mem = arrival, arrival.Memory()
	if err := sameRanges(r.mem, r.offer.RAM); err != nil {
		return &refusal{err}
	}
	r.pages, r.missing = newIncoming(r), r.mem.NewPageSet()
	accept := wire.Accept{StallMillis: uint32(r.o.Stall.Milliseconds()), Ditto: r.o.Ditto}
	if err := r.wantDisks(); err != nil {
		return err
	}
	if r.target.Load() != nil {
		accept.Capabilities |= wire.CanCopyDisks
	}
	if r.o.Postcopy {
		accept.Capabilities |= wire.CanPostcopy
	}
	for i := range r.offer.Layers {
		if r.pages.layers[i] = arrival.Layer(i); r.pages.layers[i] != nil {
			accept.Hold(i)
		}
	}
	r.pages.start()
	r.openConns()
	if err := r.say(&accept); err != nil {
		return err
	}
	if r.offer.Storage == StorageCopied {
		if err := r.say(&wire.Images{Images: r.images}); err != nil {
			return err
		}
	}
	r.phase(PhaseCopy)
	return r.rounds()
}

// refusal is the error of a VM that cannot come.
type refusal struct{ error }

// Unwrap returns the cause.
func (e *refusal) Unwrap() error { return e.error }

// openConns lets data connections in from now on.
func (r *receiver) openConns() {
	r.conns.Lock()
	defer r.conns.Unlock()
	r.conns.open = true
}

// reserve says whether a data connection of this number is expected, once.
func (r *receiver) reserve(index uint16) bool {
	r.conns.Lock()
	defer r.conns.Unlock()
	if !r.conns.open || int(index) >= len(r.conns.reserved) || r.conns.reserved[index] {
		return false
	}
	r.conns.reserved[index] = true
	return true
}

// addData reads pages from a connection from now on.
func (r *receiver) addData(conn net.Conn) error {
	r.conns.Lock()
	defer r.conns.Unlock()
	if !r.conns.open {
		return errors.New("the migration is over")
	}
	l := newLink(conn, &r.flow)
	r.add(l)
	r.readers.Go(func() { r.readData(l) })
	return nil
}

// readData takes pages and barriers from a data connection.
func (r *receiver) readData(l *link) {
	for {
		f, err := l.in.Next()
		if err != nil {
			r.end(r.cause(lost(err)))
			return
		}
		if f.Type != wire.TypeBarrier {
			if err := r.pages.take(l.in, f); err != nil {
				r.end(r.cause(err))
				return
			}
			continue
		}
		var barrier wire.Barrier
		if err := wire.Parse(f, &barrier); err != nil {
			r.end(err)
			return
		}
		select {
		case r.barriers <- barrier.Number:
		case <-r.run.Done():
			return
		}
	}
}

// decode returns what a frame on the control connection says, and takes pages
// that come there.
func (r *receiver) decode(f wire.Frame) (wire.Message, error) {
	var m wire.Message
	switch f.Type {
	case wire.TypeAlive:
		m = new(wire.Alive)
	case wire.TypeFail:
		m = new(wire.Fail)
	case wire.TypeRound:
		m = new(wire.Round)
	case wire.TypeRoundEnd:
		m = new(wire.RoundEnd)
	case wire.TypeSection:
		m = new(wire.Section)
	case wire.TypeVerify:
		m = new(wire.Verify)
	case wire.TypePrepare:
		m = new(wire.Prepare)
	case wire.TypeImageEnd:
		m = new(wire.ImageEnd)
	case wire.TypeBlocks:
		return nil, r.takeBlocks(f)
	case wire.TypeCommit:
		m = new(wire.Commit)
	case wire.TypeMissing:
		return nil, r.addMissing(f)
	default:
		if r.pulling.Load() == nil && !r.ready() {
			return nil, fmt.Errorf("the source sent %q before its offer was accepted", f.Type)
		}
		return nil, r.pages.take(r.control.in, f)
	}
	return m, wire.Parse(f, m)
}

// ready says whether pages can be taken.
func (r *receiver) ready() bool {
	r.conns.Lock()
	defer r.conns.Unlock()
	return r.conns.open
}

// rounds serves the source until everything is here and the VM is made.
func (r *receiver) rounds() error {
	for {
		m, err := r.next()
		if err != nil {
			return err
		}
		switch m := m.(type) {
		case *wire.Round:
			err = r.beginRound(m)
		case *wire.RoundEnd:
			err = r.endRound(m)
		case *wire.Section:
			err = r.addSection(m)
		case *wire.Verify:
			err = r.verify(m)
		case *wire.ImageEnd:
			err = r.endImage(m)
		case *wire.Prepare:
			return r.construct(m)
		default:
			err = fmt.Errorf("the source sent %q out of turn", m.Type())
		}
		if err != nil {
			return err
		}
	}
}

func (r *receiver) beginRound(m *wire.Round) error {
	if m.Number != r.round+1 {
		return fmt.Errorf("the source began round %d after round %d", m.Number, r.round)
	}
	r.events.tell(true, r.traffic(), func(e *Event) {
		e.Round, e.Done, e.Total = int(m.Number), 0, m.Pages<<memory.PageShift
	})
	r.pages.roundDone.Store(0)
	if m.Stopped && r.stoppedAt.IsZero() {
		r.stoppedAt = time.Now()
		r.stopped.Store(true)
		r.phase(PhaseStop)
	}
	return nil
}

// endRound waits until all that was sent in the round is in memory, and asks for
// what names did not hold for.
func (r *receiver) endRound(m *wire.RoundEnd) error {
	if m.Number != r.round+1 {
		return fmt.Errorf("the source ended round %d after round %d", m.Number, r.round)
	}
	for range r.conns.reserved {
		select {
		case n := <-r.barriers:
			if n != m.Number {
				return fmt.Errorf("a data connection ended round %d instead of %d", n, m.Number)
			}
		case <-r.run.Done():
			return context.Cause(r.run)
		}
	}
	if err := r.pages.settle(); err != nil {
		return r.cause(err)
	}
	r.round = m.Number
	if err := r.sendWanted(); err != nil {
		return err
	}
	return r.say(&wire.RoundDone{Number: m.Number})
}

// sendWanted asks for pages.
func (r *receiver) sendWanted() error {
	var frame []byte
	send := func() error {
		if len(frame) <= wire.HeaderSize {
			return nil
		}
		r.control.mu.Lock()
		defer r.control.mu.Unlock()
		return r.control.write(wire.Finish(frame, 0, wire.TypeWant, 0, 0))
	}
	frame = wire.Begin(nil)
	n := 0
	for run := range r.pages.wanted.Runs() {
		frame = wire.AppendRun(frame, wire.Run{GFN: uint64(run.Start.GFN()), Count: uint32(run.Size >> memory.PageShift)})
		if n++; n == wire.MaxRuns {
			if err := send(); err != nil {
				return r.cause(lost(err))
			}
			frame, n = wire.Begin(frame[:0]), 0
		}
	}
	if err := send(); err != nil {
		return r.cause(lost(err))
	}
	return nil
}

func (r *receiver) addSection(m *wire.Section) error {
	if len(r.sections) >= wire.MaxSections {
		return fmt.Errorf("the source sent more than %d sections of state", wire.MaxSections)
	}
	r.sections = append(r.sections, state.Section{Name: m.Name, Version: m.Version, Bytes: m.Bytes})
	return nil
}

// verify compares memory with digests of the source's.
func (r *receiver) verify(m *wire.Verify) error {
	at := memory.GFN(m.GFN).GPA()
	for i := range m.Digests {
		size := uint64(0)
		for _, region := range r.mem.Regions() {
			if region.Contains(at, 1) {
				size = min(wire.VerifyChunk<<memory.PageShift, uint64(region.End()-at))
			}
		}
		view, err := r.mem.View(at, size)
		if err != nil || size == 0 {
			return fmt.Errorf("the source sent a digest of memory at %s: %w", at, errors.Join(memory.ErrOutOfRange, err))
		}
		if r.digests.sum(view) != m.Digests[i] {
			return fmt.Errorf("memory differs from the source's in the %d KiB at %s: this is a fault of ditto; please report it", size>>10, at)
		}
		at += memory.GPA(size)
	}
	return nil
}

// construct makes the VM when all of it is here.
func (r *receiver) construct(m *wire.Prepare) error {
	if int(m.Sections) != len(r.sections) {
		return fmt.Errorf("of %d sections of state %d came", m.Sections, len(r.sections))
	}
	if m.Postcopy && !r.o.Postcopy {
		return errors.New("post-copy was not agreed on")
	}
	if r.offer.Shared && m.Postcopy {
		return errors.New("post-copy of memory that both sides share")
	}
	if !r.offer.Shared {
		if err := r.pages.complete(r.missing); err != nil {
			return err
		}
	}
	var err error
	if m.Postcopy {
		err = r.constructPart()
	} else {
		err = r.arrival.Construct(r.run, r.sections, nil, nil)
	}
	if err != nil {
		return r.cause(err)
	}
	return r.say(&wire.Ready{})
}

// constructPart makes a VM some of whose pages come later. What was received of
// these is old, and dropped.
func (r *receiver) constructPart() error {
	for run := range r.missing.Runs() {
		if err := r.mem.Discard(run.Start, run.Size); err != nil {
			return err
		}
	}
	r.puller = newPuller(r.mem, r.missing)
	r.puller.attach(r.control)
	r.pulling.Store(r.puller)
	return r.arrival.Construct(r.run, r.sections, r.missing, r.puller)
}

// addMissing notes pages that come later.
func (r *receiver) addMissing(f wire.Frame) error {
	runs, _, err := wire.ParseRuns(f)
	if err != nil {
		return err
	}
	if !r.ready() || !r.o.Postcopy {
		return errors.New("the source holds pages back, and that was not agreed on")
	}
	for i := range runs.Len() {
		m, err := rangeOf(r.mem, runs.At(i))
		if err != nil {
			return err
		}
		r.missing.Add(m.Start, m.Size)
	}
	return nil
}

// commit waits for the commit, records it, and lets the guest run.
func (r *receiver) commit() error {
	if _, err := expect[*wire.Commit](r.session); err != nil {
		return err
	}
	if r.o.Committed != nil {
		if err := r.o.Committed(r.token); err != nil {
			return fmt.Errorf("record that the VM is here now: %w", err)
		}
	}
	// From here on the VM is this side's, whatever becomes of the connection.
	r.decided.Store(int32(OutcomeCommitted))
	r.result.Committed = true
	r.result.Downtime = time.Since(r.stoppedAt)
	_, _ = r.control.send(&wire.Running{Nanos: uint64(r.result.Downtime)})
	err := r.arrival.Run(context.WithoutCancel(r.run))
	r.result.Downtime = time.Since(r.stoppedAt)
	r.result.Took = time.Since(r.began)
	if err != nil {
		return fmt.Errorf("the VM is here, but does not run: %w", err)
	}
	return nil
}

// leave ends the connections, says why if it failed, and frees what was made.
func (r *receiver) leave(err error) {
	if err != nil && !r.result.Committed {
		r.decided.Store(int32(OutcomeNever))
	}
	if r.puller != nil {
		r.puller.close(cmp.Or(err, errAllArrived))
	}
	r.pulling.Store(nil)
	select {
	case conn := <-r.again:
		_ = conn.Close()
	default:
	}
	r.finish(err)
	r.closeConns()
	if r.pages != nil {
		r.pages.stop()
	}
	if r.arrival != nil && !r.result.Committed {
		if err := r.arrival.Abandon(); err != nil {
			r.o.Log.Warn("what had arrived of a VM was not freed in full", "vm", r.offer.Name, "err", err)
		}
	}
	r.tell(err)
}

// tell says goodbye.
func (r *receiver) tell(err error) {
	var peer *PeerError
	if err == nil || errors.As(err, &peer) || r.result.Committed {
		r.control.part(nil)
		return
	}
	var refused *refusal
	r.control.part(&wire.Fail{Refused: errors.As(err, &refused), Reason: reason(err)})
}

// closeConns ends the data connections.
func (r *receiver) closeConns() {
	r.conns.Lock()
	r.conns.open = false
	r.conns.Unlock()
	r.readers.Wait()
	r.mu.Lock()
	defer r.mu.Unlock()
	for _, l := range r.links {
		if l != r.control {
			_ = l.conn.Close()
		}
	}
}

// phase begins a phase.
func (r *receiver) phase(p Phase) {
	r.events.tell(true, r.traffic(), func(e *Event) { e.Phase = p })
}

// traffic returns what was received.
func (r *receiver) traffic() Traffic {
	return Traffic{Total: r.flow.in.Load(), Back: r.flow.out.Load()}
}

// count writes into the result what was counted.
func (r *receiver) count() {
	r.result.Received = r.flow.in.Load()
	if r.pages == nil {
		return
	}
	p := &r.pages.counts
	r.result.Pages = Pages{
		Zero: p[kindZero].Load(), Named: p[kindNamed].Load(), Duplicate: p[kindDuplicate].Load(),
		Raw: p[kindRaw].Load(), Zstd: p[kindZstd].Load(), Asked: p[kindAsked].Load(),
	}
}
