package virtio

import (
	"errors"
	"sync/atomic"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func newEventfd(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func newTestWorker(t *testing.T, drain func()) *Worker {
	t.Helper()
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	w, err := NewWorker(drain)
	if err != nil {
		t.Fatal(err)
	}
	return w
}

func TestWorkerKicks(t *testing.T) {
	w := newTestWorker(t, nil)
	calls := make(chan struct{}, 100)
	q := &Queue{hooks: QueueHooks{KickFD: newEventfd(t)}}
	if err := errors.Join(w.AddQueue(q, func() { calls <- struct{}{} }), w.AddQueue(nil, nil)); err != nil {
		t.Fatal(err)
	}
	w.Start()
	<-calls // once at the start
	for range 10 {
		q.Kick()
		<-calls // every kick, though nobody reads the eventfd
	}
	w.Pause()
	q.Kick()
	if len(calls) != 0 {
		t.Error("works while paused")
	}
	w.Resume()
	<-calls
	for len(calls) > 0 { // the kick may have been seen on its own too
		<-calls
	}
	w.Pause()
	w.Resume()
	<-calls // without a kick: one may have been lost with a saved state
	w.Stop()
}

func TestWorkerDrains(t *testing.T) {
	var drains atomic.Int32
	w := newTestWorker(t, func() { drains.Add(1) })
	w.Start()
	for i := range 5 {
		w.Pause()
		w.Pause()
		if got := drains.Load(); got != int32(i+1) {
			t.Errorf("%d drains after pause %d", got, i+1)
		}
		w.Resume()
		w.Resume()
	}
	w.Stop()
	if got := drains.Load(); got != 6 {
		t.Errorf("%d drains, want 6", got)
	}
}

func TestWorkerEnds(t *testing.T) {
	t.Run("never started", func(t *testing.T) { newTestWorker(t, nil).Stop() })
	t.Run("paused", func(t *testing.T) {
		var drains atomic.Int32
		w := newTestWorker(t, func() { drains.Add(1) })
		w.Start()
		w.Pause()
		w.Stop()
		if got := drains.Load(); got != 1 {
			t.Errorf("%d drains, want 1", got)
		}
	})
	t.Run("many", func(t *testing.T) {
		for range 50 {
			w := newTestWorker(t, nil)
			w.Start()
			w.Stop()
		}
	})
}

// TestWorkerFDs changes what is watched from the worker's own goroutine.
func TestWorkerFDs(t *testing.T) {
	w := newTestWorker(t, nil)
	a, b := newEventfd(t), newEventfd(t)
	events := make(chan string)
	err := w.AddFD(a, unix.EPOLLIN, func(uint32) {
		clearEvent(a)
		if err := errors.Join(w.RemoveFD(a), w.SetEvents(b, unix.EPOLLIN)); err != nil {
			t.Error(err)
		}
		events <- "a"
	})
	err = errors.Join(err, w.AddFD(b, 0, func(uint32) {
		clearEvent(b)
		events <- "b"
	}))
	if err != nil {
		t.Fatal(err)
	}
	w.Start()
	signal(b) // not waited for yet
	signal(a)
	if first, second := <-events, <-events; first != "a" || second != "b" {
		t.Errorf("events %s, %s", first, second)
	}
	signal(a) // removed
	signal(b)
	if got := <-events; got != "b" {
		t.Errorf("event %s", got)
	}
	w.Stop()
	if err := w.SetEvents(a, 0); !errors.Is(err, unix.ENOENT) {
		t.Errorf("SetEvents of a removed descriptor: %v", err)
	}
}
