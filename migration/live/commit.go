package live

import (
	"context"
	"errors"
	"fmt"
	"time"

	"ditto.vm/memory"
	"ditto.vm/migration/state"
	"ditto.vm/migration/wire"
)

// standStill pauses the guest and sends the rest: pages, state, and that the disks
// are free. The destination has made the VM when it returns.
func (s *sender) standStill() error {
	s.phase(PhaseStop)
	if err := s.session.run.Err(); err != nil {
		return context.Cause(s.run)
	}
	s.stopped.Store(true)
	s.pausedAt, s.paused = time.Now(), true
	if err := s.vm.Pause(s.run); err != nil {
		return s.cause(err)
	}
	sections, err := s.vm.State(s.run)
	if err != nil {
		return s.cause(err)
	}
	if err := s.collectLast(); err != nil {
		return err
	}
	if err := s.lastRound(sections); err != nil {
		return err
	}
	_, err = expect[*wire.Ready](s.session)
	return err
}

// collectLast makes s.dirty what the last round sends. What is collected now comes
// on top of what the round before left. Of a guest that nobody tracks all is sent
// now, but for names that do not hold.
func (s *sender) collectLast() error {
	if s.offer.Shared {
		return nil
	}
	if !s.offer.Untracked {
		if err := s.vm.Collect(s.dirty); err != nil {
			return s.cause(err)
		}
		return nil
	}
	if err := s.firstRound(); err != nil {
		return err
	}
	for r := range s.wanted.Runs() {
		s.asked.Add(r.Start, r.Size)
		s.dirty.Add(r.Start, r.Size)
	}
	s.wanted.Clear()
	return nil
}

// lastRound sends pages as bytes, so that no name can fail, while the disks are
// given up.
func (s *sender) lastRound(sections []state.Section) error {
	postcopy := s.report.Mode == modePostcopy
	if !postcopy {
		if err := s.beginRound(s.dirty.Count(), true); err != nil {
			return err
		}
	}
	if err := s.sendWritten(); err != nil {
		return err
	}
	sent := make(chan error, 1)
	go func() {
		sent <- s.sendLast(sections, postcopy)
	}()
	s.released = true
	released := s.vm.ReleaseDisks(s.run)
	if err := errors.Join(<-sent, released); err != nil {
		return s.cause(err)
	}
	if s.o.Verify && !postcopy {
		if err := s.sendDigests(); err != nil {
			return err
		}
	}
	if err := s.say(&wire.Prepare{Sections: uint32(len(sections)), Postcopy: postcopy}); err != nil {
		return err
	}
	return s.awaitRound()
}

// sendLast sends the last pages, or which ones come later, and the state.
func (s *sender) sendLast(sections []state.Section, postcopy bool) error {
	if postcopy {
		if err := s.sendMissing(); err != nil {
			return err
		}
		return s.sendState(sections)
	}
	if err := s.sendPages(s.dirty, false); err != nil {
		return err
	}
	if err := s.sendBarriers(); err != nil {
		return err
	}
	return s.sendState(sections)
}

// sendState sends the VM's state.
func (s *sender) sendState(sections []state.Section) error {
	for _, section := range sections {
		m := wire.Section{Name: section.Name, Version: section.Version, Bytes: section.Bytes}
		n, err := s.control.send(&m)
		if err != nil {
			return lost(err)
		}
		s.traffic.add(kindState, 0, n)
	}
	return nil
}

// sendDigests sends digests of all memory.
func (s *sender) sendDigests() error {
	return eachDigests(s.mem, s.digests, func(m *wire.Verify) error { return s.say(m) })
}

// eachDigests calls do with the digests of all chunks of memory, by regions.
func eachDigests(mem *memory.Space, d digester, do func(*wire.Verify) error) error {
	const chunk = wire.VerifyChunk << memory.PageShift
	for _, region := range mem.Regions() {
		m := wire.Verify{GFN: uint64(region.Start.GFN())}
		for at := region.Start; at < region.End(); at += chunk {
			view, err := mem.View(at, min(chunk, uint64(region.End()-at)))
			if err != nil {
				return err
			}
			m.Digests = append(m.Digests, d.sum(view))
			if len(m.Digests) == wire.MaxVerify || at+chunk >= region.End() {
				if err := do(&m); err != nil {
					return err
				}
				m = wire.Verify{GFN: uint64((at + chunk).GFN())}
			}
		}
	}
	return nil
}

// commit gives the VM to the destination. From its first line on the VM runs
// here again only if the destination says that it never will there.
func (s *sender) commit() error {
	s.phase(PhaseCommit)
	s.report.Outcome = OutcomePending
	err := s.say(&wire.Commit{})
	if err == nil {
		_, err = expect[*wire.Running](s.session)
	}
	if err != nil {
		return s.inDoubt(err)
	}
	s.report.Downtime = time.Since(s.pausedAt)
	s.report.Outcome = OutcomeCommitted
	return nil
}

// inDoubt asks the destination for the outcome.
func (s *sender) inDoubt(err error) error {
	s.phase(PhaseInDoubt)
	s.o.Log.Warn("the connection ended at the commit; asking for the outcome", "vm", s.offer.Name, "err", err)
	s.finish(err)
	_ = s.control.conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), s.o.OutcomeLimit)
	defer cancel()
	for {
		outcome, askErr := AskOutcome(ctx, s.dial, s.token)
		switch outcome {
		case OutcomeCommitted:
			s.report.Downtime = time.Since(s.pausedAt)
			s.report.Outcome = OutcomeCommitted
			return nil
		case OutcomeNever:
			s.report.Outcome = OutcomeNever
			return fmt.Errorf("the destination did not take over: %w", err)
		}
		if askErr != nil {
			err = askErr
		}
		select {
		case <-ctx.Done():
			s.report.Outcome = OutcomeUnknown
			return &InDoubtError{Token: s.token, Err: err}
		case <-time.After(askInterval):
		}
	}
}

// askInterval is how often the destination is asked for the outcome.
const askInterval = 200 * time.Millisecond

// askLimit is how long one answer is waited for.
const askLimit = 5 * time.Second

// AskOutcome asks a destination what became of a migration.
func AskOutcome(ctx context.Context, dial Dialer, token Token) (Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, askLimit)
	defer cancel()
	conn, err := greet(ctx, dial, wire.Preamble{Role: wire.RoleOutcome, Token: token}, askLimit)
	if err != nil {
		return OutcomeUnknown, err
	}
	defer func() { _ = conn.Close() }()
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	f, err := wire.NewReader(conn).Next()
	if err != nil {
		return OutcomeUnknown, lost(err)
	}
	var m wire.Answer
	err = wire.Parse(f, &m)
	return m.Outcome, err
}

// leave ends the migration on this side: connections, and the VM as the outcome
// says.
func (s *sender) leave(err error) error {
	if err != nil && s.run.Err() != nil && s.report.Outcome == OutcomeNever {
		err = context.Cause(s.run)
	}
	s.part(err)
	switch s.report.Outcome {
	case OutcomeCommitted:
		if err := s.endTracking(nil); err != nil {
			s.o.Log.Warn("the VM has left, but not all was tidied up", "vm", s.offer.Name, "err", err)
		}
		s.vm.Left(s.o.Where)
		return err
	case OutcomeNever:
		return s.takeBack(err)
	default:
		return s.endTracking(err) // in doubt: it stays paused
	}
}

// part ends the connections, and says why unless the other side said so first.
func (s *sender) part(err error) {
	s.finish(err)
	defer func() {
		for _, l := range s.data {
			_ = l.conn.Close()
		}
	}()
	if s.control == nil {
		return
	}
	var peer *PeerError
	if err == nil || errors.As(err, &peer) || s.report.Outcome != OutcomeNever {
		s.control.part(nil)
		return
	}
	s.control.part(&wire.Fail{Reason: reason(err)})
}

// reason is what the other side is told of an error.
func reason(err error) string {
	if errors.Is(err, context.Canceled) {
		return "it was canceled"
	}
	return err.Error()
}

// takeBack lets the VM run on as it did before.
func (s *sender) takeBack(err error) error {
	if s.report.Throttle > 0 {
		s.vm.Throttle(0)
	}
	if s.released {
		if cause := s.reclaim(); cause != nil {
			s.report.Outcome = OutcomeUnknown
			return s.endTracking(&StuckError{Err: err, Cause: cause})
		}
	}
	if s.paused {
		if cause := s.vm.Resume(context.Background()); cause != nil {
			return s.endTracking(&StuckError{Err: err, Cause: cause})
		}
	}
	return s.endTracking(err)
}

// reclaim takes the disks back. The destination may hold them for as long as it
// takes to notice that the connection is lost.
func (s *sender) reclaim() error {
	ctx, cancel := context.WithTimeout(context.Background(), s.o.Stall+partingLimit)
	defer cancel()
	for {
		err := s.vm.ReclaimDisks(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(askInterval):
		}
	}
}

// endTracking undoes Begin.
func (s *sender) endTracking(err error) error {
	s.disarm()
	if !s.tracking {
		return err
	}
	s.tracking = false
	return errors.Join(err, s.vm.End())
}
