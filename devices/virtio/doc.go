// Package virtio holds what virtio devices share: the split virtqueue
// (virtio 1.2 2.7), the [Device] interface, the [Worker] that owns a device's
// queues, and the PCI transport (virtio 1.2 4.1).
//
//	vCPU thread --config space, BAR--> PCIDevice --Start, Stop--> Device
//	                                      |                          |
//	driver --ioeventfd--> Queue.KickFD ---|----------------------> Worker
//	                                      |                          | Pop
//	driver <--MSI-X------- Interrupt <----+-- Publish <-- Push <-----+
//
// Ownership: the transport owns registers, negotiation and eventfds. A queue
// belongs to the one goroutine that works on it, from Start to Stop. vCPU
// threads touch registers only.
//
// The rings and everything in them are written by the guest while the device
// reads. Descriptors are copied once and the copies validated; a breach of the
// protocol stops the queue and sets DEVICE_NEEDS_RESET (virtio 1.2 2.1.2), and
// the VMM goes on. Every write to guest memory is reported to the memory's
// observer.
package virtio
