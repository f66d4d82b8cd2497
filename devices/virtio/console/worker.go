package console

import (
	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// run is the device between Start and Stop.
type run struct {
	virtio.Activation
	device            *Device
	receive, transmit *virtio.Queue
	worker            *virtio.Worker
	chain             virtio.Chain
}

func newRun(a virtio.Activation, d *Device) (*run, error) {
	worker, err := virtio.NewWorker(nil)
	if err != nil {
		return nil, err
	}
	r := &run{
		Activation: a, device: d, worker: worker,
		receive: a.Queues[receiveQueue], transmit: a.Queues[transmitQueue],
	}
	if err := r.watch(); err != nil {
		worker.Stop()
		return nil, err
	}
	worker.Start()
	return r, nil
}

func (r *run) watch() error {
	if err := r.worker.AddQueue(r.receive, r.serveInput); err != nil {
		return err
	}
	if err := r.worker.AddQueue(r.transmit, r.serveOutput); err != nil {
		return err
	}
	// Edge-triggered, as for kicks: the count needs no reading.
	return r.worker.AddFD(r.device.wake, unix.EPOLLIN|unix.EPOLLET, func(uint32) {
		r.serveInput()
		r.serveOutput()
	})
}

// serveInput moves input to the guest's buffers while there are both.
func (r *run) serveInput() {
	if r.receive == nil {
		return
	}
	for range virtio.Budget {
		if !r.device.hasInput() || !r.receive.Pop(&r.chain) {
			r.receive.Publish()
			return
		}
		n, err := r.device.takeInput(&r.chain)
		if err != nil {
			r.NeedsReset(err)
		}
		r.chain.Wrote(uint64(n))
		r.receive.Push(r.chain.Head, n)
	}
	r.receive.Publish()
	r.receive.Again()
}

// serveOutput moves the guest's output to the output buffer while there is
// room. What does not fit stays on the queue until the output goroutine has
// made room and wakes the worker.
func (r *run) serveOutput() {
	if r.transmit == nil {
		return
	}
	for range virtio.Budget {
		if !r.transmit.Pop(&r.chain) {
			r.transmit.Publish()
			return
		}
		fits, err := r.device.putOutput(&r.chain)
		if err != nil {
			r.NeedsReset(err)
		} else if !fits {
			r.transmit.Rewind(1)
			r.transmit.Publish()
			return
		}
		r.transmit.Push(r.chain.Head, 0)
	}
	r.transmit.Publish()
	r.transmit.Again()
}
