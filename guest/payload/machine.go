package payload

import (
	"encoding/binary"
	"fmt"

	"ditto.vm/guest/boot"
	"ditto.vm/guest/payload/asm"
	"ditto.vm/memory"
)

// Offsets in the first page of an image.
const (
	gdtOffset     = 0x000
	gdtPtrOffset  = 0x080 // operand of LGDT
	tssOffset     = 0x100
	kernelStackAt = 0x800 // top: CPL 0, which nothing uses
	userStackAt   = 0xff0 // top: CPL 3, 16-byte aligned

	// The TSS ends in an I/O permission bitmap that opens all ports below
	// openPorts to CPL 3, and the byte of ones that must follow it. IOPL
	// would do on hardware, but PVM runs CPL 3 with the host's own IOPL.
	tssFixed  = 0x68
	openPorts = 0x400
	tssSize   = tssFixed + openPorts/8 + 1
)

// Selectors. The user ones are Linux's, because a software-virtualized KVM
// (PVM) runs a guest natively only with the selectors that its host uses.
const (
	kernelCode = 0x10
	kernelData = 0x18
	userData   = 0x28 | 3
	userCode   = 0x30 | 3
	taskState  = 0x40
)

// The descriptors (Intel SDM 3A figure 3-8): flat code and data.
const (
	descKernelCode = 0x00af9b000000ffff               // 64-bit, execute and read, DPL 0
	descKernelData = 0x00cf93000000ffff               // read and write, DPL 0
	descUserData   = 0x00cff3000000ffff               // read and write, DPL 3
	descUserCode   = 0x00affb000000ffff               // 64-bit, execute and read, DPL 3
	descTask       = 0x0000890000000000 | tssSize - 1 // available 64-bit TSS, base filled in
)

// Register values at the start of a program.
const (
	cr0Start    = 0x80010033 // PG, WP, NE, ET, MP, PE
	cr4Start    = 0x620      // PAE, OSFXSR, OSXMMEXCPT
	eferEnable  = 0x101      // LME, SCE
	eferStart   = 0x501      // LMA, LME, SCE
	rflagsStart = 0x3002     // IOPL 3

	eferMSR = 0xc0000080
	starMSR = 0xc0000081
	// starHigh is where SYSCALL and SYSRET take their selectors from:
	// kernelCode and kernelData for one, 16 and 8 above 0x20 for the other.
	starHigh = 0x0020<<16 | kernelCode
)

// writeDescriptors fills the first page of an image: GDT, the operand that
// loads it, and a TSS whose only use is to be valid.
func writeDescriptors(b []byte) {
	le := binary.LittleEndian
	base := uint64(imageBase)
	task := base + tssOffset
	for selector, d := range map[int]uint64{
		kernelCode: descKernelCode, kernelData: descKernelData,
		userData &^ 3: descUserData, userCode &^ 3: descUserCode,
		taskState:     descTask | task&0xffffff<<16 | task>>24&0xff<<56,
		taskState + 8: task >> 32,
	} {
		le.PutUint64(b[gdtOffset+selector:], d)
	}
	const gdtLimit = taskState + 16 - 1
	le.PutUint16(b[gdtPtrOffset:], gdtLimit)
	le.PutUint32(b[gdtPtrOffset+2:], uint32(base)+gdtOffset)
	le.PutUint64(b[tssOffset+4:], base+kernelStackAt) // RSP0
	le.PutUint16(b[tssOffset+0x66:], tssFixed)        // I/O map base
	b[tssOffset+tssSize-1] = 0xff
}

// Page table bits (Intel SDM 3A 4.5).
const (
	pteOpen  = 1<<0 | 1<<1 | 1<<2 // present, writable, user
	pteDirty = 1<<5 | 1<<6        // accessed and dirty, so that the CPU never writes the tables
	pteLarge = 1 << 7
)

// maxMapped is how much one PML4 entry maps.
const maxMapped = 512 << 30

// identityMap returns page tables for [0, end), to be put at the address at:
// PML4, PDPT and a page directory for each GiB.
func identityMap(at, end uint64) ([]byte, error) {
	const gib = 1 << 30
	if end > maxMapped {
		return nil, fmt.Errorf("guest RAM ends at %#x, the page tables at %#x: %w", end, uint64(maxMapped), boot.ErrNoRoom)
	}
	n := (end + gib - 1) / gib
	b := make([]byte, (2+n)*memory.PageSize)
	put := func(table, i, v uint64) {
		binary.LittleEndian.PutUint64(b[table*memory.PageSize+8*i:], v)
	}
	put(0, 0, at+memory.PageSize|pteOpen|pteDirty)
	for g := range n {
		put(1, g, at+(2+g)*memory.PageSize|pteOpen|pteDirty)
		for i := range uint64(512) {
			put(2+g, i, g*gib+i*memory.LargeFrameSize|pteOpen|pteDirty|pteLarge)
		}
	}
	return b, nil
}

// entry returns the state that starts the program directly.
func (i *image) entry() boot.Entry {
	base := uint64(imageBase)
	return boot.Entry{
		Mode: boot.ModeUser64,
		RIP:  i.start, RSP: base + userStackAt, RFLAGS: rflagsStart,
		CR0: cr0Start, CR3: i.tables, CR4: cr4Start, EFER: eferStart,
		GDT: boot.Table{Base: base + gdtOffset, Limit: taskState + 16 - 1},
		CS: boot.Segment{
			Selector: userCode, Limit: 0xffffffff, Type: 0xb, DPL: 3, Present: true, S: true, L: true, G: true,
		},
		Data: boot.Segment{
			Selector: userData, Limit: 0xffffffff, Type: 0x3, DPL: 3, Present: true, S: true, DB: true, G: true,
		},
		TR:  boot.Segment{Selector: taskState, Base: base + tssOffset, Limit: tssSize - 1, Type: 0xb, Present: true},
		LDT: boot.Segment{Type: 0x2},
	}
}

// emitStub emits the PVH entry: it starts in 32-bit protected mode without
// paging at CPL 0 and ends at "start" in 64-bit mode at CPL 3.
func emitStub(a *asm.Assembler) {
	le := binary.LittleEndian
	imm := func(v uint32, opcode ...byte) { a.Raw(le.AppendUint32(opcode, v)...) }
	base := uint32(imageBase)

	imm(base+gdtPtrOffset, 0x0f, 0x01, 0x15) // lgdt [gdtPtr]
	a.RawLabel("tables", 0xb8)               // mov eax, tables
	a.Raw(0x0f, 0x22, 0xd8)                  // mov cr3, eax
	imm(cr4Start, 0xb8)                      // mov eax, cr4Start
	a.Raw(0x0f, 0x22, 0xe0)                  // mov cr4, eax
	imm(eferMSR, 0xb9)                       // mov ecx, IA32_EFER
	imm(eferEnable, 0xb8)                    // mov eax, LME
	a.Raw(0x31, 0xd2)                        // xor edx, edx
	a.Raw(0x0f, 0x30)                        // wrmsr
	imm(cr0Start, 0xb8)                      // mov eax, cr0Start
	a.Raw(0x0f, 0x22, 0xc0)                  // mov cr0, eax
	a.RawLabel("long", 0xea)                 // jmp kernelCode:long
	a.Raw(kernelCode, 0)

	a.Label("long")              // 64-bit mode, CPL 0
	imm(taskState, 0xb8)         // mov eax, taskState
	a.Raw(0x0f, 0x00, 0xd8)      // ltr ax
	imm(userData, 0xb8)          // mov eax, userData
	a.Raw(0x8e, 0xd8)            // mov ds, eax
	a.Raw(0x8e, 0xc0)            // mov es, eax
	a.Raw(0x8e, 0xe0)            // mov fs, eax
	a.Raw(0x8e, 0xe8)            // mov gs, eax
	imm(starMSR, 0xb9)           // mov ecx, IA32_STAR
	a.Raw(0x31, 0xc0)            // xor eax, eax
	imm(starHigh, 0xba)          // mov edx, starHigh
	a.Raw(0x0f, 0x30)            // wrmsr
	a.RawLabel("start", 0xb9)    // mov ecx, start: RIP
	imm(rflagsStart, 0x41, 0xbb) // mov r11d, rflagsStart: RFLAGS
	imm(base+userStackAt, 0xbc)  // mov esp, user stack
	a.Raw(0x48, 0x0f, 0x07)      // sysretq; PVM has no IRETQ to CPL 3
}
