package virtio

import (
	"errors"
	"fmt"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// Worker is a goroutine, on an OS thread of its own, that owns queues and
// waits for their kicks and for other descriptors. Everything it is given runs
// on that goroutine, one call at a time.
//
//	NewWorker -> AddQueue, AddFD -> Start -> (Pause -> Resume)* -> Stop
//
// It blocks in epoll_wait itself instead of in the Go scheduler: a kick then
// wakes one thread and no poller in between.
type Worker struct {
	drain   func()
	epoll   int
	control int // eventfd, wakes the worker for a change of want
	sources []source
	started bool
	done    chan struct{}

	mu     sync.Mutex
	change *sync.Cond
	want   workerState // asked for by Pause, Resume and Stop
	state  workerState // reached by the worker
}

type workerState int

const (
	workerRunning workerState = iota
	workerPaused
	workerStopped
)

// source is a descriptor the worker waits on.
type source struct {
	fd    int
	queue bool
	ready func(events uint32)
}

// controlSource is the epoll key of the control eventfd.
const controlSource = -1

// NewWorker makes a worker that is not running yet. drain, if not nil, is
// called before the worker parks for a pause or ends: it finishes what is in
// flight and publishes it.
func NewWorker(drain func()) (*Worker, error) {
	if drain == nil {
		drain = func() {}
	}
	w := &Worker{drain: drain, done: make(chan struct{})}
	w.change = sync.NewCond(&w.mu)
	var err error
	if w.epoll, err = unix.EpollCreate1(unix.EPOLL_CLOEXEC); err != nil {
		return nil, fmt.Errorf("epoll_create1: %w", err)
	}
	if w.control, err = unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK); err != nil {
		return nil, errors.Join(fmt.Errorf("eventfd: %w", err), unix.Close(w.epoll))
	}
	event := unix.EpollEvent{Events: unix.EPOLLIN, Fd: controlSource}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, w.control, &event); err != nil {
		return nil, errors.Join(fmt.Errorf("epoll_ctl: %w", err), w.close())
	}
	return w, nil
}

// AddQueue makes the worker own q: ready is called after kicks, and once at
// Start and at every Resume. It must pop until Pop returns false, or know by
// itself when to go on. A nil queue (not enabled by the driver) is ignored.
// Call it before Start.
func (w *Worker) AddQueue(q *Queue, ready func()) error {
	if q == nil {
		return nil
	}
	// Edge-triggered, an eventfd needs no read to be armed again: every
	// write to it is a new edge.
	return w.add(source{fd: q.KickFD(), queue: true, ready: func(uint32) { ready() }}, unix.EPOLLIN|unix.EPOLLET)
}

// AddFD calls ready whenever fd reports one of events (EPOLLIN, EPOLLOUT,
// EPOLLET and so on). Call it before Start or on the worker's goroutine.
func (w *Worker) AddFD(fd int, events uint32, ready func(events uint32)) error {
	return w.add(source{fd: fd, ready: ready}, events)
}

// SetEvents changes what is waited for on a descriptor given to AddFD, 0 to
// wait for nothing but errors and hang-up. Call it before Start or on the
// worker's goroutine.
func (w *Worker) SetEvents(fd int, events uint32) error {
	for i, s := range w.sources {
		if s.fd == fd {
			event := unix.EpollEvent{Events: events, Fd: int32(i)}
			return unix.EpollCtl(w.epoll, unix.EPOLL_CTL_MOD, fd, &event)
		}
	}
	return fmt.Errorf("descriptor %d is not watched: %w", fd, unix.ENOENT)
}

// RemoveFD forgets a descriptor given to AddFD. Call it before Start or on the
// worker's goroutine, before the descriptor is closed.
func (w *Worker) RemoveFD(fd int) error {
	for i, s := range w.sources {
		if s.fd == fd {
			w.sources[i] = source{fd: -1}
			return unix.EpollCtl(w.epoll, unix.EPOLL_CTL_DEL, fd, nil)
		}
	}
	return fmt.Errorf("descriptor %d is not watched: %w", fd, unix.ENOENT)
}

func (w *Worker) add(s source, events uint32) error {
	event := unix.EpollEvent{Events: events, Fd: int32(len(w.sources))}
	if err := unix.EpollCtl(w.epoll, unix.EPOLL_CTL_ADD, s.fd, &event); err != nil {
		return fmt.Errorf("epoll_ctl: %w", err)
	}
	w.sources = append(w.sources, s)
	return nil
}

// Start runs the worker.
func (w *Worker) Start() {
	w.started = true
	go w.run()
}

// Pause returns when the worker has drained and parked. Kicks that come in
// the meantime are found at Resume.
func (w *Worker) Pause() { w.ask(workerPaused) }

// Resume lets a paused worker go on; every queue's ready is called once.
func (w *Worker) Resume() { w.ask(workerRunning) }

// Stop drains, ends the goroutine, joins it and closes the worker's own
// descriptors. It may follow NewWorker, Start or Pause, once.
func (w *Worker) Stop() {
	if w.started {
		w.ask(workerStopped)
		<-w.done
	}
	// Both descriptors are the worker's own; closing them cannot fail.
	_ = w.close()
}

// ask sets what is wanted and waits until the worker is there.
func (w *Worker) ask(want workerState) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.want = want
	w.change.Broadcast()
	signal(w.control)
	for w.state != want {
		w.change.Wait()
	}
}

func (w *Worker) close() error {
	return errors.Join(unix.Close(w.epoll), unix.Close(w.control))
}

// run is the worker's goroutine.
func (w *Worker) run() {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	defer close(w.done)
	w.kickAll()
	var events [16]unix.EpollEvent
	for {
		n, err := unix.EpollWait(w.epoll, events[:], -1)
		if err != nil && !errors.Is(err, unix.EINTR) {
			// Only a bad descriptor or address could fail it, and both
			// are this worker's own.
			panic(fmt.Sprintf("virtio worker: epoll_wait: %v", err))
		}
		control := false
		for i := range max(n, 0) {
			if events[i].Fd == controlSource {
				control = true
				continue
			}
			// RemoveFD may have emptied a source of this very batch.
			if s := &w.sources[events[i].Fd]; s.ready != nil {
				s.ready(events[i].Events)
			}
		}
		if control && !w.obey() {
			return
		}
	}
}

// kickAll runs every queue's ready once.
func (w *Worker) kickAll() {
	for i := range w.sources {
		if s := &w.sources[i]; s.queue {
			s.ready(unix.EPOLLIN)
		}
	}
}

// obey follows Pause, Resume and Stop. It returns false when the worker must
// end.
func (w *Worker) obey() bool {
	clearEvent(w.control)
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.want == workerRunning {
		return true
	}
	w.mu.Unlock()
	w.drain()
	w.mu.Lock()
	for w.want == workerPaused {
		w.reach(workerPaused)
		w.change.Wait()
	}
	if w.want == workerStopped {
		w.reach(workerStopped)
		return false
	}
	w.reach(workerRunning)
	w.mu.Unlock()
	w.kickAll()
	w.mu.Lock()
	return true
}

// reach records the state for those who wait for it.
//
// Preconditions: mu is held.
func (w *Worker) reach(s workerState) {
	w.state = s
	w.change.Broadcast()
}

// signal adds one to an eventfd. A full counter is as good as a signal.
func signal(fd int) {
	one := [8]byte{1}
	for {
		if _, err := unix.Write(fd, one[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}

// clearEvent resets an eventfd that does not block.
func clearEvent(fd int) {
	var count [8]byte
	for {
		if _, err := unix.Read(fd, count[:]); !errors.Is(err, unix.EINTR) {
			return
		}
	}
}
