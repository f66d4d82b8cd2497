package vmproc

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/arrival"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend/remotemigrate"
)

// Arriving is a machine on its way here.
type Arriving interface {
	live.Arrival
	// Machine is the machine, once it is constructed.
	Machine() Machine
}

// Arriver makes machines that come from other hosts: the offer's, with the
// configuration that fits this host.
type Arriver func(ctx context.Context, o live.Offer, cfg config.Config, s Surroundings) (Arriving, error)

// ReceiveOptions say how to receive one machine. Of the rest, Config, Command,
// Build, Output and Input have no meaning, and Ready is called when the guest
// runs.
type ReceiveOptions struct {
	Options
	// Configure makes the configuration for this host out of the offered one. It
	// may change what the offer says of layers.
	Configure func(o *live.Offer) (config.Config, error)
	Arrive    Arriver
	// Accept returns connections, and Release gives back what they come from.
	Accept  live.Accepter
	Release func() error
	// Outcomes are kept for sources that have to ask.
	Outcomes *Outcomes
	// Tell hears what happens.
	Tell func(ReceiveEvent)
	// Orphaned is closed when nobody waits for machines any more: one that is
	// on its way still arrives.
	Orphaned <-chan struct{}
	// Cancel is closed when who waits does not want the machine: one that runs
	// already stays.
	Cancel <-chan struct{}
	// Handed is what the machine had in another process of this host, whose name
	// it keeps: Config.Name. nil for a machine of another host.
	Handed *remotemigrate.Belongings
	// FirstLog is the log until the machine has its own.
	FirstLog *slog.Logger
}

// What is told of a migration.
const (
	ReceiveOffered  = "offered"  // a machine wants to come
	ReceiveProgress = "progress" // how far it is
	ReceiveArrived  = "arrived"  // it runs here
	ReceiveFailed   = "failed"   // nothing of it is here
)

// ReceiveEvent is what is told of a migration to this host.
type ReceiveEvent struct {
	Event    string       `json:"event"`
	Name     string       `json:"name,omitempty"` // that the machine has here
	PID      int          `json:"pid,omitempty"`
	Token    string       `json:"token,omitempty"`
	Progress *live.Event  `json:"progress,omitempty"`
	Result   *live.Result `json:"result,omitempty"`
	Error    string       `json:"error,omitempty"`
	Code     int          `json:"code,omitempty"`
	// Canceled: this side's user ended it.
	Canceled bool `json:"canceled,omitempty"`
}

// received is how a migration ended.
type received struct {
	result live.Result
	err    error
}

// receiving is a process that becomes a machine. It implements
// [live.DestinationVM].
type receiving struct {
	*process
	o        ReceiveOptions
	decision *Decision
	token    live.Token
	began    chan struct{} // closed when a source has offered a machine
	running  chan struct{} // closed when the guest runs
}

// Receive receives a machine and runs it to its end, as [Run] does with one that
// starts here. If none arrives, nothing is left.
func Receive(ctx context.Context, o ReceiveOptions) (code int, err error) {
	p := newProcess(o.Options)
	p.log, p.handed = o.FirstLog, o.Handed
	r := &receiving{process: p, o: o, began: make(chan struct{}), running: make(chan struct{})}
	defer func() {
		if e := p.close(); err == nil && e != nil {
			p.log.Warn("not all could be cleaned up", "err", e)
		}
	}()
	receive, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	done := make(chan received, 1)
	go func() {
		result, err := live.Receive(receive, r, o.Accept, r.options())
		done <- received{result, errors.Join(err, r.closeDecision(), o.Release())}
	}()
	end, arrived := r.await(cancel, done)
	if !arrived {
		return r.failed(end)
	}
	// What is fetched later comes in beside the guest.
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		if end == nil {
			e := <-done
			end = &e
		}
		r.arrived(*end)
	}()
	if p.Ready != nil {
		p.Ready(p.lease.Name)
	}
	p.Ready = nil
	if err := p.record.Truncate(0); err != nil {
		p.log.Warn("exit record", "err", err)
	}
	code, err = p.live(ctx, p.machine.Start)
	cancel(errors.New("the guest has ended"))
	<-finished
	return code, err
}

func (r *receiving) options() live.ReceiveOptions {
	fetch := arrival.CanFetch()
	if fetch != nil {
		r.log.Info("no post-copy here", "err", fetch)
	}
	return live.ReceiveOptions{
		Postcopy: fetch == nil,
		Ditto:    r.Version, Begin: r.begin, Committed: r.committed, Outcome: r.o.Outcomes.Lookup, Log: r.log,
		Events: func(e live.Event) { r.o.Tell(ReceiveEvent{Event: ReceiveProgress, Progress: &e}) },
	}
}

// await waits until the guest runs, or the migration has failed.
func (r *receiving) await(cancel context.CancelCauseFunc, done <-chan received) (end *received, arrived bool) {
	orphaned, canceled := r.o.Orphaned, r.o.Cancel
	for {
		select {
		case <-r.running:
			return nil, true
		case e := <-done:
			select {
			case <-r.running:
				return &e, true
			default:
				return &e, false
			}
		case <-r.Signals:
			cancel(errInterrupted)
		case <-canceled:
			canceled = nil
			cancel(errInterrupted)
		case <-orphaned:
			orphaned = nil
			select {
			case <-r.began:
			default:
				cancel(errInterrupted)
			}
		}
	}
}

// errInterrupted ends a migration that nobody here wants any more.
var errInterrupted = fmt.Errorf("canceled at the destination: %w", context.Canceled)

// failed tells that no machine arrived.
func (r *receiving) failed(e *received) (int, error) {
	if e.err == nil {
		e.err = errors.New("the migration ended without a machine")
	}
	code := Classify(e.err)
	if code == exit.Failure {
		code = exit.Migration
	}
	r.o.Tell(ReceiveEvent{
		Event: ReceiveFailed, Name: r.Config.Name, Token: r.token.String(), Result: trim(e.result),
		Error: e.err.Error(), Code: code, Canceled: errors.Is(e.err, errInterrupted),
	})
	return code, exit.New(code, e.err)
}

// arrived tells that the machine is here for good.
func (r *receiving) arrived(e received) {
	if e.err != nil {
		r.log.Warn("the migration did not end well", "err", e.err)
	}
	r.o.Tell(ReceiveEvent{Event: ReceiveArrived, Name: r.lease.Name, PID: os.Getpid(), Token: r.token.String(), Result: trim(e.result)})
}

// trim leaves out of a result what nobody wants to read again.
func trim(result live.Result) *live.Result {
	result.Offer = live.Offer{Name: result.Offer.Name, Ditto: result.Offer.Ditto}
	return &result
}

// begin notes which migration this process decides about.
func (r *receiving) begin(t live.Token) (err error) {
	r.token = t
	close(r.began)
	r.decision, err = r.o.Outcomes.Begin(t)
	return err
}

func (r *receiving) committed(live.Token) error { return r.decision.Commit() }

func (r *receiving) closeDecision() error {
	if r.decision == nil {
		return nil
	}
	return r.decision.Close()
}

// Prepare implements [live.DestinationVM].
func (r *receiving) Prepare(ctx context.Context, o live.Offer) (live.Arrival, error) {
	cfg, err := r.o.Configure(&o)
	if err != nil {
		return nil, err
	}
	if r.handed != nil && cfg.Name != r.Config.Name {
		return nil, fmt.Errorf("the machine %s comes where %s was expected", cfg.Name, r.Config.Name)
	}
	r.Config = cfg
	r.o.Tell(ReceiveEvent{Event: ReceiveOffered, Name: cfg.Name, Token: r.token.String()})
	surroundings, err := r.openPlace()
	if err != nil {
		return nil, err
	}
	if o.Config, err = json.Marshal(r.Config); err != nil {
		return nil, err
	}
	if err := r.publish(disksOf(r.Config, false), true); err != nil {
		return nil, err
	}
	a, err := r.o.Arrive(ctx, o, r.Config, surroundings)
	if err != nil {
		return nil, err
	}
	return arrival.Watched{
		Arrival:     a,
		Constructed: func() error { return r.constructed(a.Machine()) },
		Running: func() {
			if r.handed != nil {
				if err := r.lease.TakeOver(); err != nil {
					r.log.Error("the machine runs, and cannot be reached", "err", err)
				}
			}
			r.onClose(r.machine.Close)
			close(r.running)
		},
	}, nil
}

// constructed makes what the machine needs to be reached, and drops the rights of
// the process: what is still to come cannot fail for the lack of something.
func (r *receiving) constructed(m Machine) (err error) {
	r.machine = m
	if r.record, err = r.lease.KeepExit(); err != nil {
		return err
	}
	r.onClose(r.record.Close)
	if err := r.listen(); err != nil {
		return err
	}
	return r.restrict()
}
