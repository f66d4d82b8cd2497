// Package console is the virtio console device (virtio 1.2 5.3) with one port:
// /dev/hvc0 in a Linux guest.
//
//	guest --transmitq--> worker --> output buffer --goroutine--> Config.Output
//	guest <--receiveq--- worker <-- input buffer <-- WriteInput
//
// A writer that does not keep up stalls the guest's console, never a vCPU, a
// pause or a reset: the worker leaves what does not fit on the queue.
//
// Ownership: the worker owns both queues. The buffers outlive a reset of the
// device; [New] starts the goroutine that writes to Output, and
// [Device.Close] ends and joins it.
package console
