package live

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/wire"
)

// sender is the state machine of the source.
//
//	connect -> begin -> names -> round, round, ... -> stop -> commit -> running
//	   |         |        |        |                   |         |
//	   +---------+--------+--------+-------------------+         +-> in doubt:
//	         failed: disks taken back, resumed                       ask for the outcome
type sender struct {
	*session
	o      Options
	vm     SourceVM
	dial   Dialer
	report Report
	events events

	seed     uint64
	digests  digester
	offer    Offer
	mem      *memory.Space
	held     []bool // by layer: the destination has it
	recorded Recorded
	data     []*link // that pages travel on
	workers  []*worker
	limiter  *limiter
	blocks   *blockSender // nil unless disks are copied

	// named are pages that were sent by name: the next time they are sent as
	// bytes, since a page that was written, or whose name did not hold, rarely
	// equals what it did.
	named *memory.PageSet
	// wanted are pages that the destination asked for; the control reader adds.
	wanted *memory.PageSet
	// asked are those of them that this round sends.
	asked *memory.PageSet
	// late are pages that a round left, since its time was over; workers add.
	late     *memory.PageSet
	deadline time.Time // of pre-copy, zero for none
	// dirty are pages that were written since they were sent.
	dirty *memory.PageSet

	traffic  traffic
	requests chan []memory.Range // of post-copy
	round    int
	// What was done to the VM, and is undone when it stays.
	tracking, paused, released bool
	pausedAt                   time.Time
}

// traffic is [Traffic] and [Pages] while they are counted.
type traffic struct {
	bytes, pages [kinds]atomic.Uint64
	roundDone    atomic.Uint64 // pages
}

// kind is how a page travels.
type kind int

const (
	kindZero kind = iota
	kindNamed
	kindDuplicate
	kindRaw
	kindZstd
	kindAsked
	kindState
	kindDisk
	kinds
)

// Send moves a VM to where dial leads. When it returns, the VM has left, or runs
// (or stands) as it did before, or the error is an [InDoubtError] or
// [StuckError]. Until the commit point the context cancels it.
func Send(ctx context.Context, vm SourceVM, dial Dialer, o Options) (Report, error) {
	began := time.Now()
	s, err := newSender(ctx, vm, dial, o)
	if err != nil {
		return Report{}, err
	}
	err = s.migrate(ctx)
	s.report.Total = time.Since(began)
	s.count()
	if err != nil {
		s.emit(Event{Phase: PhaseFailed, Error: err.Error()})
		return s.report, err
	}
	s.emit(Event{Phase: PhaseDone})
	return s.report, nil
}

// withDefaults fills in what was not said.
func (o Options) withDefaults() (Options, error) {
	switch {
	case o.Connections < 0 || o.Connections > wire.MaxConnections:
		return o, fmt.Errorf("%d data connections: 0 to %d are possible", o.Connections, wire.MaxConnections)
	case o.Proof == "":
		o.Proof = ProofXXH3
	case o.Proof != ProofXXH3 && o.Proof != ProofBLAKE3:
		return o, fmt.Errorf("no such proof: %q", o.Proof)
	}
	switch o.Compression {
	case "":
		o.Compression = Uncompressed
	case Uncompressed, Zstd:
	default:
		return o, fmt.Errorf("no such compression: %q", o.Compression)
	}
	switch o.OnTimeout {
	case "":
		o.OnTimeout = TimeoutAbort
	case TimeoutAbort, TimeoutStop, TimeoutPostcopy:
	default:
		return o, fmt.Errorf("no such policy for time-outs: %q", o.OnTimeout)
	}
	for value, usual := range map[*time.Duration]time.Duration{
		&o.Downtime: 300 * time.Millisecond, &o.Stall: 30 * time.Second, &o.OutcomeLimit: time.Minute,
	} {
		if *value <= 0 {
			*value = usual
		}
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	return o, nil
}

func newSender(ctx context.Context, vm SourceVM, dial Dialer, o Options) (*sender, error) {
	o, err := o.withDefaults()
	if err != nil {
		return nil, err
	}
	s := &sender{o: o, vm: vm, dial: dial, limiter: &limiter{rate: o.Bandwidth}, requests: make(chan []memory.Range, 64)}
	s.events.init(o.Events)
	// What ends a session is its own: the caller's context cancels it only up to
	// the commit point.
	s.session = newSession(context.WithoutCancel(ctx), o.Stall)
	var random [24]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	s.token = Token(random[:16])
	s.seed = binary.LittleEndian.Uint64(random[16:])
	s.digests = digester{kind: wire.DigestXXH3, seed: s.seed}
	if o.Proof == ProofBLAKE3 {
		s.digests.kind = wire.DigestBLAKE3
	}
	s.report = Report{
		Token: s.token, Outcome: OutcomeNever, Where: o.Where, Mode: modePrecopy, Connections: o.Connections,
	}
	return s, nil
}

// migrate does all of it.
func (s *sender) migrate(ctx context.Context) (err error) {
	uncancel := context.AfterFunc(ctx, func() { s.end(context.Cause(ctx)) })
	defer uncancel()
	defer func() { err = s.leave(err) }()
	if s.offer, err = s.vm.Offer(s.run); err != nil {
		return err
	}
	if err := s.describe(); err != nil {
		return err
	}
	s.offer.Shared = s.o.Shared
	s.events.begin(s.offer.Name)
	s.mem = s.vm.Memory()
	s.report.RAM = s.mem.Size()
	s.named, s.wanted, s.asked, s.dirty = s.mem.NewPageSet(), s.mem.NewPageSet(), s.mem.NewPageSet(), s.mem.NewPageSet()
	s.late = s.mem.NewPageSet()
	s.phase(PhaseConnect)
	if err := s.connect(); err != nil {
		return err
	}
	if err := s.vm.Begin(s.run); err != nil {
		return err
	}
	s.tracking = true
	if err := s.sendDisks(); err != nil {
		return err
	}
	if err := s.nameAll(); err != nil {
		return err
	}
	switch {
	case s.offer.Shared:
		s.report.Mode = modeShared
	case s.offer.Untracked:
		s.report.Mode = modeStop
	default:
		if err := s.precopy(); err != nil {
			return err
		}
	}
	if err := s.standStill(); err != nil {
		return err
	}
	// The last chance to cancel: who cancels later is too late.
	if !uncancel() {
		return context.Cause(ctx)
	}
	if err := s.commit(); err != nil {
		return err
	}
	if s.report.Mode == modePostcopy {
		return s.pull(s.run.Err() == nil)
	}
	return nil
}

// connect opens the control connection, offers the VM, and opens the others when
// it was accepted.
func (s *sender) connect() error {
	conn, err := greet(s.run, s.dial, wire.Preamble{Role: wire.RoleControl, Token: s.token}, s.o.Stall)
	if err != nil {
		return err
	}
	s.control = newLink(conn, &s.flow)
	s.add(s.control)
	s.start(s.decode)
	hello := wire.Hello{
		Capabilities: s.o.capabilities(),
		Seed:         s.seed, Digests: s.digests.kind, Connections: uint16(s.o.Connections),
		StallMillis: uint32(s.o.Stall.Milliseconds()), Ditto: s.offer.Ditto,
	}
	if err := s.say(&hello); err != nil {
		return err
	}
	b, err := json.Marshal(s.offer)
	if err != nil {
		return err
	}
	if len(b) > wire.MaxOffer {
		return fmt.Errorf("the description of the VM has %d bytes, more than %d", len(b), wire.MaxOffer)
	}
	if err := s.say(&wire.Offer{JSON: b}); err != nil {
		return err
	}
	accept, err := expect[*wire.Accept](s.session)
	if err != nil {
		return err
	}
	if lacks := s.o.capabilities() &^ accept.Capabilities; lacks&wire.CanPostcopy != 0 {
		return errors.New("the destination cannot do post-copy; leave it away, or look there what ditto doctor says of userfaultfd")
	}
	if s.o.Disks == StorageCopied && accept.Capabilities&wire.CanCopyDisks == 0 {
		return errors.New("the destination cannot take copies of disks: update ditto there, or share them")
	}
	s.setTick(min(s.o.Stall, time.Duration(accept.StallMillis)*time.Millisecond))
	s.held = make([]bool, len(s.offer.Layers))
	for i := range s.held {
		s.held[i] = accept.Holds(i)
	}
	if err := s.agree(); err != nil {
		return err
	}
	return s.connectData()
}

// connectData opens the data connections.
func (s *sender) connectData() error {
	for i := range s.o.Connections {
		conn, err := greet(s.run, s.dial, wire.Preamble{Role: wire.RoleData, Index: uint16(i), Token: s.token}, s.o.Stall)
		if err != nil {
			return s.cause(err)
		}
		l := newLink(conn, &s.flow)
		s.data = append(s.data, l)
		s.add(l)
	}
	if len(s.data) == 0 {
		s.data = []*link{s.control}
	}
	return nil
}

// capabilities are what the destination must be able to do.
func (o Options) capabilities() (c wire.Capabilities) {
	if o.Postcopy || o.OnTimeout == TimeoutPostcopy {
		c |= wire.CanPostcopy
	}
	if o.Disks == StorageCopied {
		c |= wire.CanCopyDisks
	}
	return c
}

// decode returns what a frame of the destination says. It runs on the control
// reader.
func (s *sender) decode(f wire.Frame) (wire.Message, error) {
	var m wire.Message
	switch f.Type {
	case wire.TypeAccept:
		m = new(wire.Accept)
	case wire.TypeFail:
		m = new(wire.Fail)
	case wire.TypeAlive:
		m = new(wire.Alive)
	case wire.TypeRoundDone:
		m = new(wire.RoundDone)
	case wire.TypeReady:
		m = new(wire.Ready)
	case wire.TypeRunning:
		m = new(wire.Running)
	case wire.TypeImages:
		m = new(wire.Images)
	case wire.TypeImageDone:
		m = new(wire.ImageDone)
	case wire.TypePulled:
		m = new(wire.Pulled)
	case wire.TypeWant:
		return nil, s.want(f)
	case wire.TypeRequest:
		return nil, s.request(f)
	default:
		return nil, fmt.Errorf("the destination sent %q, which is for sources", f.Type)
	}
	return m, wire.Parse(f, m)
}

// want notes pages that the destination needs as bytes.
func (s *sender) want(f wire.Frame) error {
	runs, _, err := wire.ParseRuns(f)
	if err != nil {
		return err
	}
	for i := range runs.Len() {
		r, err := rangeOf(s.mem, runs.At(i))
		if err != nil {
			return fmt.Errorf("the destination asked for pages: %w", err)
		}
		s.wanted.Add(r.Start, r.Size)
	}
	return nil
}

// rangeOf returns the guest memory of a run.
func rangeOf(mem *memory.Space, r wire.Run) (memory.Range, error) {
	m := memory.Range{Start: memory.GFN(r.GFN).GPA(), Size: uint64(r.Count) << memory.PageShift}
	if !mem.Contains(m.Start, m.Size) {
		return memory.Range{}, fmt.Errorf("%d pages from %#x on: %w", r.Count, r.GFN, memory.ErrOutOfRange)
	}
	return m, nil
}

// nameAll finds out what pages equal.
func (s *sender) nameAll() error {
	if s.o.NoNames || s.offer.Shared {
		return nil
	}
	s.phase(PhaseNames)
	began := time.Now()
	recorded, err := s.vm.Names(s.run, func(done, total uint64) { s.progress(done, total) })
	s.report.Names = time.Since(began)
	if err != nil {
		return s.cause(fmt.Errorf("find out what pages equal: %w", err))
	}
	s.recorded = recorded
	return nil
}
