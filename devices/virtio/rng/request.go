package rng

import (
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
)

// maxRequest bounds the bytes given for one request. Linux asks for 64 to 512;
// a longer buffer gets its first part, as the specification allows, so that no
// guest keeps the host's generator busy with a single chain.
const maxRequest = 4096

// errRequest is wrapped when a request is against virtio 1.2 5.4.6.
var errRequest = errors.New("malformed entropy request")

// fill writes random bytes to the start of the chain and returns how many.
func fill(c *virtio.Chain, source Source) (uint32, error) {
	if len(c.Readable) != 0 || c.WritableBytes == 0 {
		return 0, fmt.Errorf("%w: %d readable buffers, %d writable bytes", errRequest, len(c.Readable), c.WritableBytes)
	}
	total := 0
	for _, b := range c.Writable {
		p := b.Data[:min(len(b.Data), maxRequest-total)]
		for len(p) > 0 {
			n, err := source(p)
			total += n
			if err != nil {
				return uint32(total), fmt.Errorf("read randomness: %w", err)
			}
			p = p[n:]
		}
	}
	return uint32(total), nil
}

// getrandom reads from the kernel's generator, which blocks only before it was
// seeded at boot.
func getrandom(p []byte) (int, error) {
	for {
		n, err := unix.Getrandom(p, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		return max(n, 0), err
	}
}
