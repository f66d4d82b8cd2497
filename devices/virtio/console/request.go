package console

import (
	"errors"
	"fmt"

	"ditto.vm/devices/virtio"
)

// maxOutput bounds one chain of output in bytes. Linux sends at most a page on
// a console port; the cap lets the buffer take every chain whole.
const maxOutput = 64 << 10

// errRequest is wrapped when a chain is against virtio 1.2 5.3.6.
var errRequest = errors.New("malformed console request")

func (d *Device) hasInput() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.in.used > 0
}

// takeInput fills the chain with input and returns how many bytes it wrote.
func (d *Device) takeInput(c *virtio.Chain) (uint32, error) {
	if len(c.Readable) > 0 || c.WritableBytes == 0 {
		return 0, fmt.Errorf("%w: %d readable buffers, %d writable bytes for input", errRequest, len(c.Readable), c.WritableBytes)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	total := 0
	for _, b := range c.Writable {
		n := d.in.take(b.Data)
		total += n
		if n < len(b.Data) {
			break
		}
	}
	d.changed.Broadcast()
	return uint32(total), nil
}

// putOutput appends the chain to the output, all of it or nothing, and reports
// whether it fitted.
func (d *Device) putOutput(c *virtio.Chain) (bool, error) {
	if len(c.Writable) > 0 || c.ReadableBytes > maxOutput {
		return false, fmt.Errorf("%w: %d writable buffers, %d bytes of output", errRequest, len(c.Writable), c.ReadableBytes)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if uint64(d.out.room()) < c.ReadableBytes {
		return false, nil
	}
	for _, b := range c.Readable {
		d.out.put(b.Data)
	}
	d.changed.Broadcast()
	return true, nil
}
