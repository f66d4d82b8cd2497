// Package devices holds what every emulated device needs and nothing of KVM:
// register windows on a [Bus], interrupt [Line]s, message-signalled interrupts
// ([MSIAllocator]) and [Doorbells].
//
//	vCPU thread --exit--> Bus --> Handler (registers only)
//	                                 |  starts, stops
//	guest kick --ioeventfd--------> worker (owns its queues)
//	                                 |
//	guest  <--irqfd--- Line / MSI <--+
//
// The devices themselves live in the folders below: pci (host bridge, ECAM,
// MSI-X), virtio (queues, the PCI transport and one folder a device), and the
// small platform devices (serial, rtc, ged, pvpanic, reset).
//
// The machine (package vmm) implements the interfaces over KVM; tests
// implement them with fakes.
package devices
