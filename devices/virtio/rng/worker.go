package rng

import (
	"ditto.vm/devices/virtio"
)

// run is the device between Start and Stop.
type run struct {
	virtio.Activation
	source Source
	queue  *virtio.Queue
	worker *virtio.Worker
	chain  virtio.Chain
}

func newRun(a virtio.Activation, source Source) (*run, error) {
	r := &run{Activation: a, source: source, queue: a.Queues[0]}
	worker, err := virtio.NewWorker(nil)
	if err != nil {
		return nil, err
	}
	if err := worker.AddQueue(r.queue, r.serve); err != nil {
		worker.Stop()
		return nil, err
	}
	r.worker = worker
	worker.Start()
	return r, nil
}

// serve answers the requests that are waiting.
func (r *run) serve() {
	for range virtio.Budget {
		if !r.queue.Pop(&r.chain) {
			r.queue.Publish()
			return
		}
		n, err := fill(&r.chain, r.source)
		if err != nil {
			r.NeedsReset(err)
		}
		r.chain.Wrote(uint64(n))
		r.queue.Push(r.chain.Head, n)
	}
	r.queue.Publish()
	r.queue.Again()
}
