package boot

import (
	"encoding/binary"
	"fmt"
	"math"
)

// The parts of ELF-64 that a kernel needs (System V ABI, chapters 4 and 5).
// debug/elf would do, but it brings DWARF and decompressors into the VM
// process and reads section headers, which a loader has no use for.
const (
	elfMagic = "\x7fELF"

	elfClass64      = 2
	elfLittleEndian = 1
	elfMachineX8664 = 62

	elfHeaderSize  = 64
	progHeaderSize = 56

	progLoad = 1
	progNote = 4

	// maxProgHeaders bounds the table. Linux has 5 or 6 entries.
	maxProgHeaders = 128
	// maxNotes bounds one note segment, in bytes. Linux has under 1 KiB.
	maxNotes = 64 << 10
)

// progHeader is one program header.
type progHeader struct {
	kind              uint32
	offset            uint64 // in the file
	paddr             uint64
	fileSize, memSize uint64
	align             uint64
}

// elfMachines names the machines that users have kernels for.
var elfMachines = map[uint16]string{
	3: "32-bit x86", 8: "MIPS", 20: "PowerPC", 21: "64-bit PowerPC", 22: "s390",
	40: "32-bit ARM", 183: "arm64", 243: "RISC-V", 258: "LoongArch",
}

// parseELF checks the ELF header and returns the program headers that carry
// memory or notes; every file range lies inside the file and no memory range
// wraps.
func parseELF(image *Image, head []byte) ([]progHeader, error) {
	le := binary.LittleEndian
	if image.Size < elfHeaderSize {
		return nil, fmt.Errorf("ELF header is cut off: %w", ErrTruncated)
	}
	machine := le.Uint16(head[18:])
	if head[5] != elfLittleEndian || head[4] != elfClass64 || machine != elfMachineX8664 {
		name := elfMachines[machine]
		if name == "" {
			name = fmt.Sprintf("ELF machine %d, class %d, byte order %d", machine, head[4], head[5])
		}
		return nil, fmt.Errorf("is for %s: %w", name, ErrArchitecture)
	}
	phoff, size, n := le.Uint64(head[32:]), le.Uint16(head[54:]), int(le.Uint16(head[56:]))
	if n == 0 || size != progHeaderSize || n > maxProgHeaders {
		return nil, fmt.Errorf("ELF file has %d program headers of %d bytes: %w", n, size, ErrNotKernel)
	}
	if !inFile(image.Size, phoff, uint64(n)*progHeaderSize) {
		return nil, fmt.Errorf("program headers lie behind the end of the file: %w", ErrTruncated)
	}
	table := make([]byte, n*progHeaderSize)
	if err := image.readAt(table, int64(phoff)); err != nil {
		return nil, err
	}
	var headers []progHeader
	for i := range n {
		b := table[i*progHeaderSize:]
		p := progHeader{
			kind: le.Uint32(b), offset: le.Uint64(b[8:]), paddr: le.Uint64(b[24:]),
			fileSize: le.Uint64(b[32:]), memSize: le.Uint64(b[40:]), align: le.Uint64(b[48:]),
		}
		if p.kind != progLoad && p.kind != progNote {
			continue
		}
		if !inFile(image.Size, p.offset, p.fileSize) {
			return nil, fmt.Errorf("segment %d lies behind the end of the file: %w", i, ErrTruncated)
		}
		if p.kind == progLoad && (p.fileSize > p.memSize || p.memSize > math.MaxUint64-p.paddr) {
			return nil, fmt.Errorf("segment %d has bad sizes: %w", i, ErrNotKernel)
		}
		headers = append(headers, p)
	}
	return headers, nil
}

// inFile reports whether [offset, offset+n) lies inside a file of size bytes.
func inFile(size int64, offset, n uint64) bool {
	return offset <= uint64(size) && n <= uint64(size)-offset
}

// PVH's note (xen/include/public/elfnote.h).
const (
	xenNoteName    = "Xen\x00"
	xenPhys32Entry = 18
)

// findPVHEntry looks for XEN_ELFNOTE_PHYS32_ENTRY in the note segments.
func findPVHEntry(image *Image, headers []progHeader) (uint32, error) {
	for _, p := range headers {
		if p.kind != progNote {
			continue
		}
		if p.fileSize > maxNotes {
			return 0, fmt.Errorf("note segment of %d bytes: %w", p.fileSize, ErrNotKernel)
		}
		notes := make([]byte, p.fileSize)
		if err := image.readAt(notes, int64(p.offset)); err != nil {
			return 0, err
		}
		if desc, ok := findNote(notes, p.align, xenNoteName, xenPhys32Entry); ok {
			return pvhEntry(desc)
		}
	}
	return 0, fmt.Errorf("no XEN_ELFNOTE_PHYS32_ENTRY note; use the bzImage, or a kernel with CONFIG_PVH: %w", ErrNoPVH)
}

// pvhEntry decodes the note: a 32-bit address in 4 or 8 bytes.
func pvhEntry(desc []byte) (uint32, error) {
	le := binary.LittleEndian
	switch {
	case len(desc) == 4:
		return le.Uint32(desc), nil
	case len(desc) == 8 && le.Uint64(desc) <= math.MaxUint32:
		return uint32(le.Uint64(desc)), nil
	}
	return 0, fmt.Errorf("PVH entry note holds % x: %w", desc, ErrNoPVH)
}

// findNote returns the descriptor of the first note with that name and type.
func findNote(notes []byte, align uint64, name string, kind uint32) ([]byte, bool) {
	if align != 8 {
		align = 4
	}
	pad := func(n uint64) uint64 { return (n + align - 1) &^ (align - 1) }
	le := binary.LittleEndian
	for len(notes) >= 12 {
		nameSize, descSize, k := uint64(le.Uint32(notes)), uint64(le.Uint32(notes[4:])), le.Uint32(notes[8:])
		descStart := pad(12 + nameSize)
		if descStart+descSize > uint64(len(notes)) {
			return nil, false
		}
		if k == kind && string(notes[12:12+nameSize]) == name {
			return notes[descStart : descStart+descSize], true
		}
		notes = notes[min(pad(descStart+descSize), uint64(len(notes))):]
	}
	return nil, false
}
