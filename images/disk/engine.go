package disk

// engine is what both kinds of queue can do for any image.
type engine interface {
	Queue
	read(r *Raw, token int, bufs [][]byte, offset int64)
	write(r *Raw, token int, bufs [][]byte, offset int64, sync bool)
	flush(r *Raw, token int)
	start(token int, run func() error)
}

// newEngine makes a queue over r, or over nothing in particular if r is nil.
func newEngine(r *Raw, depth int) (engine, error) {
	p, err := newPool(r, depth)
	if err != nil {
		return nil, err
	}
	ring, err := newRing(depth)
	if err != nil {
		// Forbidden by sysctl or seccomp, or an old kernel.
		return p, nil
	}
	return &ringQueue{raw: r, ring: ring, pool: p, ops: make([]ringOp, depth), fds: []int{ring.fd, p.event}}, nil
}

// Engine does I/O on several images without waiting. It is used like a
// [Queue], which is one over a single image.
type Engine struct{ e engine }

// NewEngine makes an engine for up to depth requests in flight, with io_uring
// where the kernel allows it and threads where not.
func NewEngine(depth int) (*Engine, error) {
	e, err := newEngine(nil, depth)
	if err != nil {
		return nil, err
	}
	return &Engine{e}, nil
}

// FDs become readable when requests complete, as in [Queue].
func (e *Engine) FDs() []int { return e.e.FDs() }

// Read fills bufs from offset of r.
func (e *Engine) Read(r *Raw, token int, bufs [][]byte, offset int64) {
	e.e.read(r, token, bufs, offset)
}

// Write writes bufs at offset of r; with sync it completes when stable.
func (e *Engine) Write(r *Raw, token int, bufs [][]byte, offset int64, sync bool) {
	e.e.write(r, token, bufs, offset, sync)
}

// Flush makes stable what was written to r and completed before.
func (e *Engine) Flush(r *Raw, token int) { e.e.flush(r, token) }

// Do runs a function that may wait, on another thread.
func (e *Engine) Do(token int, run func() error) { e.e.start(token, run) }

// Submit starts what was asked for.
func (e *Engine) Submit() { e.e.Submit() }

// Completed returns a request that completed, if there is one.
func (e *Engine) Completed() (token int, err error, ok bool) { return e.e.Completed() }

// Wait returns when Completed may have one; something is in flight.
func (e *Engine) Wait() { e.e.Wait() }

// Close ends the engine. Nothing may be in flight.
func (e *Engine) Close() error { return e.e.Close() }
