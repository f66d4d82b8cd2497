// Package virtiotest is the driver's side of virtio, for tests, benchmarks and
// fuzzers: a small machine of fakes, a driver that goes through the PCI
// transport's registers as a guest's would, and a conformance suite that every
// device type passes.
//
//	Driver --ECAM, BAR, doorbells--> Machine (fake KVM) --> virtio.PCIDevice
//	   ^                                                        |
//	   +------- rings in memory.Space, fake MSI-X --------------+
//
// Nothing here runs in the VMM.
package virtiotest
