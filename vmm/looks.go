package vmm

import (
	"context"
	"fmt"
	"runtime/debug"
	"sync"

	"ditto.vm/vmm/api"
)

// looks are those who read guest memory from outside the VM's own threads, one
// at a time. They end before memory goes away. The zero value is ready.
type looks struct {
	turn sync.Mutex // held by the one that looks

	mu      sync.Mutex // guards what follows
	closed  bool
	cancels map[int]context.CancelFunc
	next    int
	under   sync.WaitGroup
}

// begin registers a look and waits for its turn. Its context ends with ctx, or
// when the VM is closed; done must be called when memory is not looked at any
// more.
func (l *looks) begin(ctx context.Context) (_ context.Context, done func(), err error) {
	ctx, leave, err := l.enter(ctx)
	if err != nil {
		return nil, nil, err
	}
	l.turn.Lock()
	return ctx, func() {
		l.turn.Unlock()
		leave()
	}, nil
}

// enter is begin for who looks beside others.
func (l *looks) enter(ctx context.Context) (_ context.Context, leave func(), err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, nil, fmt.Errorf("look at memory: the VM is closed: %w", api.ErrWrongState)
	}
	ctx, cancel := context.WithCancel(ctx)
	if l.cancels == nil {
		l.cancels = make(map[int]context.CancelFunc)
	}
	id := l.next
	l.next++
	l.cancels[id] = cancel
	l.under.Add(1)
	return ctx, func() {
		cancel()
		l.mu.Lock()
		delete(l.cancels, id)
		l.mu.Unlock()
		l.under.Done()
	}, nil
}

// close ends the looks under way, waits for them and refuses others.
func (l *looks) close() {
	l.mu.Lock()
	l.closed = true
	for _, cancel := range l.cancels {
		cancel()
	}
	l.mu.Unlock()
	l.under.Wait()
}

// glimpse is the state of the VM while somebody looks at its memory.
type glimpse struct {
	still  bool // nothing runs
	paused bool // for this look
	calls  int  // of Pause, then
	epoch  [2]int
}

// look calls do while memory stays mapped, with the VM paused if that is asked
// for, and reports whether nothing ran all the while. A VM that was running is
// resumed, unless somebody else paused it meanwhile.
func (m *VM) look(ctx context.Context, pause bool, do func(ctx context.Context, still bool) error) (exact bool, err error) {
	ctx, done, err := m.looks.begin(ctx)
	if err != nil {
		return false, err
	}
	defer done()
	defer m.dropMaps()
	if err := ctx.Err(); err != nil {
		return false, err
	}
	g, err := m.beginGlimpse(ctx, pause)
	if err != nil {
		return false, err
	}
	defer func() {
		var endErr error
		exact, endErr = m.endGlimpse(context.WithoutCancel(ctx), g)
		if err == nil {
			err = endErr
		}
	}()
	return false, do(ctx, g.still)
}

// mapsWorthDropping is the memory from which a look is worth a collection: its
// maps take 8 bytes a page, 8 MiB for it.
const mapsWorthDropping = 4 << 30

// dropMaps gives the memory of a look back to the host, which the collector
// would do only minutes later.
func (m *VM) dropMaps() {
	if m.mem.Size() >= mapsWorthDropping {
		debug.FreeOSMemory()
	}
}

func (m *VM) beginGlimpse(ctx context.Context, pause bool) (glimpse, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	var g glimpse
	if pause && m.leaving {
		return g, fmt.Errorf("look at memory: the VM is being migrated and cannot be paused for that: %w", api.ErrWrongState)
	}
	if pause && m.state == api.Running {
		if err := m.pause(ctx); err != nil {
			return g, err
		}
		g.paused, g.calls = true, m.pauseCalls
	}
	g.still = m.state != api.Running
	g.epoch = [2]int{m.resumes, m.resets}
	return g, nil
}

func (m *VM) endGlimpse(ctx context.Context, g glimpse) (exact bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	exact = g.still && m.state != api.Running && g.epoch == [2]int{m.resumes, m.resets}
	if g.paused && m.state == api.Paused && m.pauseCalls == g.calls {
		err = m.resume(ctx)
	}
	return exact, err
}
