package net

// Backend moves frames between the device and the host. Nothing of it opens
// files or sockets: it is made from a descriptor that was opened before the
// process dropped its rights, and does not block.
//
// Send and Flush are called by one goroutine, Receive and SetOffloads by
// another.
type Backend interface {
	// FD is readable when Receive may go on and writable when Send may, or
	// -1 for a backend that never has anything to receive.
	FD() int
	// Offloads are the virtio-net feature bits for checksums and
	// segmentation that the backend can honour, both ways. It does not
	// change.
	Offloads() uint64
	// SetOffloads says which of the guest's offload bits are in effect.
	SetOffloads(features uint64) error
	// Receive reads the next frame, a struct virtio_net_hdr before it, into
	// the buffers, and returns the length of both in bytes. The buffers hold
	// the longest frame that the offloads in effect and the MTU allow; a
	// longer one is cut or dropped. unix.EAGAIN means that there is none,
	// any other error that there never will be.
	Receive(to [][]byte) (int, error)
	// Send takes one frame; from[0] is its struct virtio_net_hdr and nothing
	// else. unix.EAGAIN means that the frame was not taken and FD is to
	// become writable first, ErrDropped that it was dropped, any other
	// error that no frame will be taken any more.
	Send(from [][]byte) error
	// Flush sends what Send has gathered. unix.EAGAIN means that FD is to
	// become writable first.
	Flush() error
}
