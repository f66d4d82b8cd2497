package console

// ring is a bounded queue of bytes.
type ring struct {
	bytes []byte // storage
	start int    // of the oldest byte
	used  int
}

func newRing(size int) ring { return ring{bytes: make([]byte, size)} }

// room is how many bytes fit.
func (r *ring) room() int { return len(r.bytes) - r.used }

// put appends what fits of p and returns how much that was.
func (r *ring) put(p []byte) int {
	n := min(len(p), r.room())
	end := (r.start + r.used) % len(r.bytes)
	k := copy(r.bytes[end:], p[:n])
	copy(r.bytes, p[k:n])
	r.used += n
	return n
}

// take moves the oldest bytes to p and returns how many.
func (r *ring) take(p []byte) int {
	n := r.peek(p)
	r.start = (r.start + n) % len(r.bytes)
	r.used -= n
	return n
}

// peek copies the oldest bytes to p and returns how many.
func (r *ring) peek(p []byte) int {
	n := min(len(p), r.used)
	k := copy(p[:n], r.bytes[r.start:])
	copy(p[k:n], r.bytes)
	return n
}
