package boot

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// Where the boot structures lie. Each area ends where the next begins.
const (
	gdtAddr       memory.GPA = 0x500
	startInfoAddr memory.GPA = 0x6000
	zeroPageAddr  memory.GPA = 0x7000
	stackTop      memory.GPA = 0x8ff0
	pageTableAddr memory.GPA = 0x9000
	cmdlineAddr   memory.GPA = 0x20000

	// lowReserved is where the last KiB of conventional memory, the legacy
	// video hole and the firmware area begin; lowEnd is where they end.
	lowReserved memory.GPA = 0x9fc00
	lowEnd      memory.GPA = 0x100000
)

// maxCmdline is the longest command line that the area holds, with its NUL.
const maxCmdline = int(lowReserved - cmdlineAddr)

// Control register and EFER bits (Intel SDM 3A 2.5, 2.2.1).
const (
	cr0PE = 1 << 0
	cr0ET = 1 << 4
	cr0NE = 1 << 5
	cr0PG = 1 << 31

	cr4PAE = 1 << 5

	eferLME = 1 << 8
	eferLMA = 1 << 10

	rflagsFixed = 1 << 1 // always one
)

// Selectors that the Linux boot protocol asks for: __BOOT_CS and __BOOT_DS.
const (
	bootCS = 0x10
	bootDS = 0x18
	bootTR = 0x20
)

// Segment types (Intel SDM 3A 3.4.5.1, 3.5).
const (
	typeData    = 0x3 // read, write, accessed
	typeCode    = 0xb // execute, read, accessed
	typeBusyTSS = 0xb // with S clear
	typeLDT     = 0x2
)

// tssLimit is the limit of the smallest TSS of any mode, in bytes minus one.
const tssLimit = 0x67

// flatSegments returns the segments of a flat address space at CPL 0, with
// code for long mode or for 32-bit protected mode.
func flatSegments(long bool) (code, data, task Segment) {
	code = Segment{Selector: bootCS, Limit: 0xffffffff, Type: typeCode, Present: true, S: true, G: true, L: long, DB: !long}
	data = Segment{Selector: bootDS, Limit: 0xffffffff, Type: typeData, Present: true, S: true, G: true, DB: true}
	// VM entry wants a busy TSS in TR (Intel SDM 3C 27.3.1.2). No code uses it.
	task = Segment{Selector: bootTR, Limit: tssLimit, Type: typeBusyTSS, Present: true}
	return code, data, task
}

// descriptor encodes s as an 8-byte descriptor (Intel SDM 3A figure 3-8). The
// base must fit 32 bits.
func (s Segment) descriptor() uint64 {
	limit := uint64(s.Limit)
	if s.G {
		limit >>= 12
	}
	d := limit&0xffff | (s.Base&0xffffff)<<16 | uint64(s.Type&0xf)<<40 | uint64(s.DPL&3)<<45 |
		(limit>>16&0xf)<<48 | (s.Base>>24&0xff)<<56
	for _, bit := range []struct {
		set bool
		at  uint
	}{{s.S, 44}, {s.Present, 47}, {s.L, 53}, {s.DB, 54}, {s.G, 55}} {
		if bit.set {
			d |= 1 << bit.at
		}
	}
	return d
}

// writeGDT writes a GDT with the boot selectors and returns its register.
func writeGDT(mem *memory.Space, code, data, task Segment) (Table, error) {
	entries := [6]uint64{bootCS / 8: code.descriptor(), bootDS / 8: data.descriptor(), bootTR / 8: task.descriptor()}
	var b [len(entries) * 8]byte
	for i, e := range entries {
		binary.LittleEndian.PutUint64(b[8*i:], e)
	}
	return Table{Base: uint64(gdtAddr), Limit: uint16(len(b) - 1)}, mem.WriteAt(b[:], gdtAddr)
}

// Page table bits (Intel SDM 3A 4.5).
const (
	ptePresent = 1 << 0
	pteWrite   = 1 << 1
	pteLarge   = 1 << 7
)

// writeIdentityMap maps the low 4 GiB with 2 MiB pages, writable and
// executable at CPL 0, and returns CR3.
func writeIdentityMap(mem *memory.Space) (uint64, error) {
	const gib = 4
	b := make([]byte, (2+gib)*memory.PageSize)
	entry := func(table, i int, v uint64) {
		binary.LittleEndian.PutUint64(b[table*memory.PageSize+8*i:], v)
	}
	page := func(table int) uint64 { return uint64(pageTableAddr) + uint64(table)*memory.PageSize }

	entry(0, 0, page(1)|ptePresent|pteWrite)
	for i := range gib {
		entry(1, i, page(2+i)|ptePresent|pteWrite)
		for j := range 512 {
			frame := uint64(512*i+j) * memory.LargeFrameSize
			entry(2+i, j, frame|ptePresent|pteWrite|pteLarge)
		}
	}
	return uint64(pageTableAddr), mem.WriteAt(b, pageTableAddr)
}

// writeCmdline writes the command line with its terminating NUL.
func writeCmdline(mem *memory.Space, cmdline string) error {
	return mem.WriteAt(append([]byte(cmdline), 0), cmdlineAddr)
}
