package balloon

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// maxReport bounds the bytes that one chain reports as free. Linux reports at
// most 32 blocks of 4 MiB.
const maxReport = 256 << 20

// budget is how many chains are served before the worker looks at what else
// there is to do. Each may cost a discard of megabytes.
const budget = 16

// run is the device between Start and Stop.
type run struct {
	virtio.Activation
	device *Device
	worker *virtio.Worker
	chain  virtio.Chain

	stats virtio.Chain // the driver's buffer, waiting for the next question
	held  bool         // stats is not pushed

	raw    [4 * maxPages]byte
	pages  []uint32
	warned bool // of a discard that failed
}

func newRun(a virtio.Activation, d *Device) (*run, error) {
	r := &run{Activation: a, device: d, pages: make([]uint32, 0, maxPages)}
	worker, err := virtio.NewWorker(r.ask)
	if err != nil {
		return nil, err
	}
	r.worker = worker
	if err := r.watch(); err != nil {
		worker.Stop()
		return nil, err
	}
	worker.Start()
	return r, nil
}

func (r *run) watch() error {
	for i, serve := range [numQueues]func(*virtio.Chain) error{
		inflateQueue:      r.inflate,
		deflateQueue:      r.deflate,
		oldReportingQueue: r.report,
		reportingQueue:    r.report,
	} {
		q := r.Queues[i]
		if q == nil {
			continue
		}
		ready := func() { r.serve(q, serve) }
		switch i {
		case statsQueue:
			ready = r.takeStats
		case oldReportingQueue, reportingQueue:
			q.SetMaxChainBytes(maxReport)
		}
		if err := r.worker.AddQueue(q, ready); err != nil {
			return err
		}
	}
	return r.worker.AddFD(r.device.timer, unix.EPOLLIN, func(uint32) {
		var count [8]byte
		_, _ = unix.Read(r.device.timer, count[:]) // clears it
		r.ask()
	})
}

// serve answers what is waiting on q.
func (r *run) serve(q *virtio.Queue, serve func(*virtio.Chain) error) {
	for range budget {
		if !q.Pop(&r.chain) {
			q.Publish()
			return
		}
		if err := serve(&r.chain); err != nil {
			r.NeedsReset(err)
		}
		q.Push(r.chain.Head, 0)
	}
	q.Publish()
	q.Again()
}

// inflate gives the chain's pages back to the host.
func (r *run) inflate(c *virtio.Chain) error {
	return r.eachRun(c, func(pages memory.Range) error {
		if h := r.device.holder; h != nil {
			h.Hold(pages)
		}
		return r.discard(pages.Start, pages.Size)
	})
}

// deflate does nothing to memory: the pages come back when they are touched.
func (r *run) deflate(c *virtio.Chain) error {
	h := r.device.holder
	if h == nil {
		return checkPages(c)
	}
	return r.eachRun(c, func(pages memory.Range) error { h.Release(pages); return nil })
}

// eachRun calls do for each run of consecutive pages that the chain names.
func (r *run) eachRun(c *virtio.Chain, do func(memory.Range) error) error {
	if err := checkPages(c); err != nil {
		return err
	}
	n := c.ReadAt(r.raw[:], 0)
	for pages := sortPages(r.pages, r.raw[:n]); len(pages) > 0; {
		run, rest := nextRun(pages)
		if err := do(run); err != nil {
			return err
		}
		pages = rest
	}
	return nil
}

// report gives the chain's buffers back to the host: the guest has freed them
// and does not use them before the chain is pushed (virtio 1.2 5.5.6.7).
func (r *run) report(c *virtio.Chain) error {
	if len(c.Readable) > 0 {
		return fmt.Errorf("%w: %d readable buffers in a free page report", errRequest, len(c.Readable))
	}
	for _, b := range c.Writable {
		if err := r.discard(b.GPA, uint64(len(b.Data))); err != nil {
			return err
		}
	}
	return nil
}

// discard gives guest memory back to the host. What the host cannot take back
// stays where it is, which is no fault of the guest.
func (r *run) discard(gpa memory.GPA, n uint64) error {
	err := r.Memory.Discard(gpa, n)
	switch {
	case errors.Is(err, memory.ErrOutOfRange):
		return fmt.Errorf("%w: %w", errRequest, err)
	case err != nil:
		if !r.warned {
			r.Log.Warn("the host does not take memory back from the guest", "err", err)
		}
		r.warned = true
		return nil
	}
	r.device.reclaimed.Add(n)
	return nil
}

// takeStats keeps the driver's answer and its buffer.
func (r *run) takeStats() {
	q := r.Queues[statsQueue]
	if r.held || !q.Pop(&r.stats) {
		return
	}
	r.held = true
	if len(r.stats.Writable) > 0 {
		r.NeedsReset(fmt.Errorf("%w: %d writable buffers in statistics", errRequest, len(r.stats.Writable)))
		return
	}
	var raw [statEntry * maxStatEntries]byte
	stats := parseStats(raw[:r.stats.ReadAt(raw[:], 0)])
	stats.At = time.Now()
	r.device.setStats(stats)
}

// ask gives the driver its buffer back, which it fills anew. Before a pause and
// at the end this empties the queue.
func (r *run) ask() {
	if !r.held {
		return
	}
	r.held = false
	q := r.Queues[statsQueue]
	q.Push(r.stats.Head, 0)
	q.Publish()
	// A driver with several buffers has the next one waiting.
	q.Again()
}
