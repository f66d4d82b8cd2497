package virtio

import "ditto.vm/memory"

// Buffer is one element of a descriptor chain: validated guest memory. The
// guest may change the bytes at any time; copy before validating.
type Buffer struct {
	GPA  memory.GPA
	Data []byte
}

// Chain is one request: what the driver wrote for the device, then what the
// device may write. [Queue.Pop] fills it and keeps its slices for the next
// use, so a chain that lives long costs no allocation. The zero value is ready.
type Chain struct {
	// Head names the chain when it is given back with [Queue.Push].
	Head uint16
	// Readable buffers were written by the driver.
	Readable []Buffer
	// Writable buffers are for the device's answer.
	Writable []Buffer
	// ReadableBytes and WritableBytes are the sums of the lengths, at most
	// [MaxChainBytes] together.
	ReadableBytes, WritableBytes uint64

	mem *memory.Space
}

// reset forgets the buffers and keeps their storage.
func (c *Chain) reset() {
	c.Readable, c.Writable = c.Readable[:0], c.Writable[:0]
	c.ReadableBytes, c.WritableBytes = 0, 0
}

// ReadAt copies from the readable buffers, starting offset bytes into them. It
// returns how many bytes it copied, fewer than len(p) at the end.
func (c *Chain) ReadAt(p []byte, offset uint64) int {
	n := 0
	for _, b := range c.Readable {
		if offset >= uint64(len(b.Data)) {
			offset -= uint64(len(b.Data))
			continue
		}
		n += copy(p[n:], b.Data[offset:])
		if n == len(p) {
			break
		}
		offset = 0
	}
	return n
}

// WriteAt copies p to the writable buffers, starting offset bytes into them,
// and reports the write to the memory's observer. It returns how many bytes
// fitted.
func (c *Chain) WriteAt(p []byte, offset uint64) int {
	n := 0
	for _, b := range c.Writable {
		if offset >= uint64(len(b.Data)) {
			offset -= uint64(len(b.Data))
			continue
		}
		k := copy(b.Data[offset:], p[n:])
		c.mem.Wrote(b.GPA+memory.GPA(offset), uint64(k))
		n += k
		if n == len(p) {
			break
		}
		offset = 0
	}
	return n
}

// Wrote reports that the first n writable bytes were changed by other means
// than WriteAt, for example by readv into the buffers. Call it before Push.
func (c *Chain) Wrote(n uint64) {
	for _, b := range c.Writable {
		k := min(n, uint64(len(b.Data)))
		if k == 0 {
			return
		}
		c.mem.Wrote(b.GPA, k)
		n -= k
	}
}

// Slice returns bytes [from, to) of the buffer.
func (b Buffer) Slice(from, to int) Buffer {
	return Buffer{b.GPA + memory.GPA(from), b.Data[from:to]}
}
