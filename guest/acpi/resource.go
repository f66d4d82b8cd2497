package acpi

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// resources is _CRS: a buffer of resource descriptors with an end tag
// (ACPI 6.5, 6.4).
func resources(descriptors ...[]byte) code {
	var all []byte
	for _, d := range descriptors {
		all = append(all, d...)
	}
	return named("_CRS", buffer(append(all, 0x79, 0)))
}

// ports is a fixed range of I/O ports, IO (Decode16, ...) (6.4.2.5).
func ports(base uint16, n uint8) []byte {
	le := binary.LittleEndian
	d := []byte{0x47, 1}
	d = le.AppendUint16(d, base)
	d = le.AppendUint16(d, base)
	return append(d, 1, n)
}

// interrupt is Interrupt (ResourceConsumer, Edge or Level, ActiveHigh,
// Exclusive) { gsi } (6.4.3.6).
func interrupt(gsi uint32, level bool) []byte {
	const consumer, edge = 1 << 0, 1 << 1
	flags := byte(consumer | edge)
	if level {
		flags = consumer
	}
	return binary.LittleEndian.AppendUint32([]byte{0x89, 6, 0, flags, 1}, gsi)
}

// fixedMemory is Memory32Fixed (ReadWrite, ...) (6.4.3.4).
func fixedMemory(r memory.Range) []byte {
	le := binary.LittleEndian
	d := []byte{0x86, 9, 0, 1}
	d = le.AppendUint32(d, uint32(r.Start))
	return le.AppendUint32(d, uint32(r.Size))
}

// Resource types and flags of address space descriptors (6.4.3.5).
const (
	spaceMemory = 0
	spaceIO     = 1
	spaceBus    = 2

	// producer with a fixed minimum and maximum, positive decode.
	producerFixed = 1<<2 | 1<<3
	memoryRW      = 1 << 0 // not cacheable, read-write
	ioEntireRange = 3
)

// wordSpace is WordBusNumber or WordIO for [first, last].
func wordSpace(kind, flags byte, first, last uint16) []byte {
	le := binary.LittleEndian
	d := []byte{0x88, 13, 0, kind, producerFixed, flags}
	for _, v := range []uint16{0, first, last, 0, last - first + 1} {
		d = le.AppendUint16(d, v)
	}
	return d
}

// dwordMemory is DWordMemory for a window below 4 GiB.
func dwordMemory(r memory.Range) []byte {
	le := binary.LittleEndian
	d := []byte{0x87, 23, 0, spaceMemory, producerFixed, memoryRW}
	for _, v := range []uint32{0, uint32(r.Start), uint32(r.End() - 1), 0, uint32(r.Size)} {
		d = le.AppendUint32(d, v)
	}
	return d
}

// qwordMemory is QWordMemory for a window anywhere.
func qwordMemory(r memory.Range) []byte {
	le := binary.LittleEndian
	d := []byte{0x8a, 43, 0, spaceMemory, producerFixed, memoryRW}
	for _, v := range []uint64{0, uint64(r.Start), uint64(r.End() - 1), 0, r.Size} {
		d = le.AppendUint64(d, v)
	}
	return d
}
