// Package state is how the state of a virtual machine, apart from the pages of
// its memory, is written down: a list of sections, each a protobuf message with
// a version of its own. A snapshot stores them, a migration sends them.
//
//	machine   what the state belongs to: vCPUs, memory, devices
//	cpu       CPUID, registers, local APIC, MSRs of every vCPU
//	irqchip   PICs, IOAPIC, PIT
//	clock     kvmclock, and when it was read
//	platform  serial port, RTC, power and generation events, ACPI timer
//	pci       the bus and its host bridge
//	blk0 ..   one a virtio device: its PCI function, queues and the device itself
//
// Sections come from files and peers: nothing in them is trusted. [NewSet] and
// [Decode] bound them before they allocate; a section that this ditto does not
// know, that is too new, or that has fields this ditto would lose is refused by
// its name. The methods called State then turn messages into the plain states
// that devices check once more when they are given them.
//
// A section's version counts up when its meaning changes in a way that an older
// ditto must not ignore. The version before is still read.
package state

// The generator's plugin is google.golang.org/protobuf/cmd/protoc-gen-go of the
// version that go.mod names.
//go:generate protoc --go_out=. --go_opt=paths=source_relative state.proto
