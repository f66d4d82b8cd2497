// Package rng is the virtio entropy device (virtio 1.2 5.4): one queue of
// buffers that the host fills with random bytes.
//
//	requestq --worker--> getrandom(2), straight into guest memory
//
// Ownership: the worker owns the queue. The device has no configuration and no
// state of its own; what the guest was given is forgotten.
package rng
