package virtiotest

import (
	"errors"
	"sync"

	"ditto.vm/devices/virtio"
)

// Echo is the smallest complete device: it answers each chain with what the
// chain said. It serves the tests of the transport and shows device writers
// the shape of one.
type Echo struct {
	Sizes []uint16 // of its queues
	// FailStart, if not nil, is what Start returns.
	FailStart error

	mu     sync.Mutex // guards config and notify
	config [8]byte
	notify func()

	worker *virtio.Worker
}

// ID implements virtio.Device; no driver knows this number.
func (e *Echo) ID() virtio.ID { return 63 }

// Features implements virtio.Device: bit 0 means nothing.
func (e *Echo) Features() uint64 { return 1 }

// QueueSizes implements virtio.Device.
func (e *Echo) QueueSizes() []uint16 { return e.Sizes }

// ReadConfig implements virtio.Device.
func (e *Echo) ReadConfig(offset uint64, data []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	clear(data)
	if offset < uint64(len(e.config)) {
		copy(data, e.config[offset:])
	}
}

// WriteConfig implements virtio.Device: all of its configuration is writable.
func (e *Echo) WriteConfig(offset uint64, data []byte) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if offset < uint64(len(e.config)) {
		copy(e.config[offset:], data)
	}
}

// SetConfig changes the configuration from the host's side.
func (e *Echo) SetConfig(b byte) {
	e.mu.Lock()
	e.config[0] = b
	notify := e.notify
	e.mu.Unlock()
	if notify != nil {
		notify()
	}
}

// Start implements virtio.Device.
func (e *Echo) Start(a virtio.Activation) error {
	if e.FailStart != nil {
		return e.FailStart
	}
	w, err := virtio.NewWorker(nil)
	if err != nil {
		return err
	}
	for _, q := range a.Queues {
		if err := w.AddQueue(q, echoQueue(q)); err != nil {
			w.Stop()
			return err
		}
	}
	e.mu.Lock()
	e.notify = a.ConfigChanged
	e.mu.Unlock()
	e.worker = w
	w.Start()
	return nil
}

// echoQueue returns what serves q.
func echoQueue(q *virtio.Queue) func() {
	var c virtio.Chain
	buf := make([]byte, 4096)
	return func() {
		for q.Pop(&c) {
			n := c.ReadAt(buf, 0)
			if c.ReadableBytes > uint64(len(buf)) {
				q.Fail(errors.New("request is too long"))
			}
			q.Push(c.Head, uint32(c.WriteAt(buf[:n], 0)))
		}
		q.Publish()
	}
}

// Stop implements virtio.Device.
func (e *Echo) Stop() {
	e.worker.Stop()
	e.mu.Lock()
	e.notify = nil
	e.mu.Unlock()
}

// Pause implements virtio.Device.
func (e *Echo) Pause() { e.worker.Pause() }

// Resume implements virtio.Device.
func (e *Echo) Resume() { e.worker.Resume() }
