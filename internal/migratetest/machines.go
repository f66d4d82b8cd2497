package migratetest

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
)

// World is what two hosts share.
type World struct {
	mu     sync.Mutex // guards what follows
	runs   map[string]bool
	disks  string // who has their locks
	broken []string
}

// NewWorld returns one in which nothing runs.
func NewWorld() *World { return &World{runs: map[string]bool{}} }

// Runs is who lets the guest run, "" for nobody, and what was wrong so far.
func (w *World) Runs() (who string, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	for who = range w.runs {
	}
	if len(w.broken) > 0 {
		return who, fmt.Errorf("%v", w.broken)
	}
	return who, nil
}

func (w *World) run(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.runs[who] = true
	if len(w.runs) > 1 {
		w.broken = append(w.broken, "it runs twice")
	}
	if w.disks != who {
		w.broken = append(w.broken, who+" runs without its disks")
	}
}

func (w *World) stop(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.runs, who)
}

func (w *World) lock(who string) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.disks != "" && w.disks != who {
		return errors.New("the disks are in use")
	}
	w.disks = who
	return nil
}

func (w *World) unlock(who string) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.disks == who {
		w.disks = ""
	}
}

// Source is a machine that can leave. Its guest writes nothing.
type Source struct {
	Name   string
	Config json.RawMessage
	// Gone is where it went.
	Gone chan string

	world *World
	who   string
	mem   *memory.Space
}

// NewSource returns a machine that runs in a world, under a name for its host.
func NewSource(w *World, who string, size uint64) (*Source, error) {
	mem, err := memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	if err != nil {
		return nil, err
	}
	// Bytes that are nowhere else.
	for at := uint64(0); at < size; at += memory.PageSize {
		if err := mem.WriteAt(fmt.Appendf(nil, "page at %#x", at), memory.GPA(at)); err != nil {
			return nil, errors.Join(err, mem.Close())
		}
	}
	s := &Source{Name: "vm", Config: json.RawMessage(`{}`), Gone: make(chan string, 1), world: w, who: who, mem: mem}
	if err := w.lock(who); err != nil {
		return nil, errors.Join(err, mem.Close())
	}
	w.run(who)
	return s, nil
}

// Close frees the memory.
func (s *Source) Close() error { return s.mem.Close() }

// Offer implements live.SourceVM.
func (s *Source) Offer(context.Context) (live.Offer, error) {
	o := live.Offer{Name: s.Name, Ditto: "test", Config: s.Config}
	for _, r := range s.mem.Regions() {
		o.RAM = append(o.RAM, r.Range)
	}
	return o, nil
}

// Memory implements live.SourceVM.
func (s *Source) Memory() *memory.Space { return s.mem }

// Blocks implements live.SourceVM: it has no disks.
func (s *Source) Blocks() live.BlockSource { return nil }

// Begin implements live.SourceVM.
func (s *Source) Begin(context.Context) error { return nil }

// Load implements live.Recorded: nothing is known.
func (s *Source) Load(dst []names.Name, _ memory.GFN) { clear(dst) }

// Names implements live.SourceVM.
func (s *Source) Names(context.Context, func(done, total uint64)) (live.Recorded, error) {
	return s, nil
}

// Collect implements live.SourceVM.
func (s *Source) Collect(*memory.PageSet) error { return nil }

// Throttle implements live.SourceVM.
func (s *Source) Throttle(int) {}

// Pause implements live.SourceVM.
func (s *Source) Pause(context.Context) error {
	s.world.stop(s.who)
	return nil
}

// Resume implements live.SourceVM.
func (s *Source) Resume(context.Context) error {
	s.world.run(s.who)
	return nil
}

// State implements live.SourceVM.
func (s *Source) State(context.Context) ([]state.Section, error) {
	return []state.Section{{Name: "machine", Version: 1, Bytes: []byte("state")}}, nil
}

// ReleaseDisks implements live.SourceVM.
func (s *Source) ReleaseDisks(context.Context) error {
	s.world.unlock(s.who)
	return nil
}

// ReclaimDisks implements live.SourceVM.
func (s *Source) ReclaimDisks(context.Context) error { return s.world.lock(s.who) }

// End implements live.SourceVM.
func (s *Source) End() error { return nil }

// Committed implements live.SourceVM: nobody ends this one.
func (s *Source) Committed() <-chan struct{} { return nil }

// Left implements live.SourceVM.
func (s *Source) Left(where string) { s.Gone <- where }

// Arrival is a machine on its way. It implements live.Arrival, and, alone,
// live.DestinationVM.
type Arrival struct {
	// ConstructErr and RunErr break it.
	ConstructErr, RunErr error

	world *World
	who   string
	mem   *memory.Space
}

// NewArrival returns a machine that comes to a host of a world.
func NewArrival(w *World, who string) *Arrival { return &Arrival{world: w, who: who} }

// Prepare implements live.DestinationVM.
func (a *Arrival) Prepare(_ context.Context, o live.Offer) (live.Arrival, error) {
	var size uint64
	for _, r := range o.RAM {
		size += r.Size
	}
	var err error
	a.mem, err = memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	return a, err
}

// Memory implements live.Arrival.
func (a *Arrival) Memory() *memory.Space { return a.mem }

// Blocks implements live.Arrival: it has no disks.
func (a *Arrival) Blocks() live.BlockTarget { return nil }

// Layer implements live.Arrival.
func (a *Arrival) Layer(int) io.ReaderAt { return nil }

// Construct implements live.Arrival.
func (a *Arrival) Construct(context.Context, []state.Section, *memory.PageSet, memory.PageSource) error {
	if a.ConstructErr != nil {
		return a.ConstructErr
	}
	return a.world.lock(a.who)
}

// Run implements live.Arrival.
func (a *Arrival) Run(context.Context) error {
	if a.RunErr != nil {
		return a.RunErr
	}
	a.world.run(a.who)
	return nil
}

// Abandon implements live.Arrival.
func (a *Arrival) Abandon() error {
	a.world.unlock(a.who)
	return a.mem.Close()
}

// Stop ends a machine that arrived.
func (a *Arrival) Stop() error {
	a.world.stop(a.who)
	a.world.unlock(a.who)
	return a.mem.Close()
}
