package boot

import (
	"encoding/binary"
	"fmt"

	"ditto.vm/memory"
)

// Offsets into the setup header of a bzImage, which has the same place in the
// file and in the zero page (Documentation/arch/x86/boot.rst, "The Real-Mode
// Kernel Header"). u-root's pkg/boot/bzimage knows the same fields, but its
// unmarshaller decompresses the kernel; the VMM needs only these.
const (
	offSetupSects      = 0x1f1 // u8
	offSyssize         = 0x1f4 // u32, 16-byte units
	offBootFlag        = 0x1fe // u16
	offJump            = 0x200 // u8 opcode, u8 distance: the header's end
	offHeader          = 0x202 // "HdrS"
	offVersion         = 0x206 // u16
	offTypeOfLoader    = 0x210 // u8
	offLoadflags       = 0x211 // u8
	offRamdiskImage    = 0x218 // u32
	offRamdiskSize     = 0x21c // u32
	offCmdLinePtr      = 0x228 // u32
	offInitrdAddrMax   = 0x22c // u32
	offKernelAlignment = 0x230 // u32
	offRelocatable     = 0x234 // u8
	offXloadflags      = 0x236 // u16
	offCmdlineSize     = 0x238 // u32
	offSetupData       = 0x250 // u64
	offPrefAddress     = 0x258 // u64
	offInitSize        = 0x260 // u32
	offHeaderMin       = 0x264 // where a header of version 2.12 ends
)

// Offsets of the zero page outside the setup header (zero-page.rst).
const (
	offACPIRSDP    = 0x070 // u64
	offE820Entries = 0x1e8 // u8
	offE820Table   = 0x2d0 // 128 entries of 20 bytes
	e820EntrySize  = 20
)

const (
	bootFlag    = 0xaa55
	headerMagic = "HdrS"

	// version212 is the first version with xloadflags, and so the first
	// that can say it has a 64-bit entry point.
	version212 = 0x020c

	loadedHigh = 1 << 0 // loadflags: protected-mode code at 1 MiB or above
	kernel64   = 1 << 0 // xloadflags: 64-bit entry point at +0x200

	undefinedLoader = 0xff // type_of_loader of who has no number

	entry64 = 0x200 // of startup_64, from the start of the protected-mode code

	sector = 512
)

// setupHeader is what the loader needs of a bzImage, checked.
type setupHeader struct {
	kernelOffset int64  // of the protected-mode code in the file
	kernelSize   uint64 // bytes of it
	headerEnd    int    // end of the setup header in the file
	initrdMax    uint64 // highest address of the initrd's last byte
	cmdlineMax   int    // bytes without the NUL
	loadAddr     uint64
	initSize     uint64 // bytes the kernel needs from loadAddr before it reads the memory map
}

// parseSetupHeader checks the header of a bzImage of size bytes. head is its
// beginning.
func parseSetupHeader(head []byte, size int64) (setupHeader, error) {
	le := binary.LittleEndian
	if size < offHeaderMin || len(head) < headSize {
		return setupHeader{}, fmt.Errorf("setup header is cut off: %w", ErrTruncated)
	}
	version := le.Uint16(head[offVersion:])
	if version < version212 || le.Uint16(head[offXloadflags:])&kernel64 == 0 {
		return setupHeader{}, fmt.Errorf("32-bit kernel (boot protocol %d.%02d without a 64-bit entry point): %w", version>>8, version&0xff, ErrArchitecture)
	}
	if head[offLoadflags]&loadedHigh == 0 {
		return setupHeader{}, fmt.Errorf("zImage, which loads low: %w", ErrNotKernel)
	}
	sectors := int64(head[offSetupSects])
	if sectors == 0 {
		sectors = 4 // "for backwards compatibility"
	}
	h := setupHeader{
		kernelOffset: (sectors + 1) * sector,
		headerEnd:    offHeader + int(head[offJump+1]),
		initrdMax:    uint64(le.Uint32(head[offInitrdAddrMax:])),
		cmdlineMax:   int(le.Uint32(head[offCmdlineSize:])),
		loadAddr:     le.Uint64(head[offPrefAddress:]),
		initSize:     uint64(le.Uint32(head[offInitSize:])),
	}
	if h.headerEnd < offHeaderMin || h.headerEnd > headSize {
		return setupHeader{}, fmt.Errorf("setup header ends at %#x: %w", h.headerEnd, ErrNotKernel)
	}
	if want := h.kernelOffset + int64(le.Uint32(head[offSyssize:]))*16; size < want || size <= h.kernelOffset+entry64 {
		return setupHeader{}, fmt.Errorf("has %d bytes, its header says %d: %w", size, max(want, h.kernelOffset+entry64+1), ErrTruncated)
	}
	// Everything after the setup code is loaded, as other loaders do: a
	// signature behind the kernel does no harm.
	h.kernelSize = uint64(size - h.kernelOffset)
	if align := uint64(le.Uint32(head[offKernelAlignment:])); align != 0 && head[offRelocatable] != 0 && h.loadAddr%align != 0 {
		return setupHeader{}, fmt.Errorf("preferred address %#x is not aligned to %#x: %w", h.loadAddr, align, ErrNotKernel)
	}
	if h.loadAddr < uint64(lowEnd) || h.loadAddr > uint64(memory.HoleStart) {
		return setupHeader{}, fmt.Errorf("preferred address %#x is not between 1 MiB and 3 GiB: %w", h.loadAddr, ErrNotKernel)
	}
	return h, nil
}

// loadLinux64 loads a bzImage for its 64-bit entry point.
func (l *loader) loadLinux64(head []byte) error {
	kernel := l.config.Kernel
	h, err := parseSetupHeader(head, kernel.Size)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", kernel.Name, err)
	}
	if len(l.config.Cmdline) > h.cmdlineMax {
		return tooLong(l.config.Cmdline, h.cmdlineMax)
	}
	load := memory.GPA(h.loadAddr)
	need := max(h.kernelSize, h.initSize)
	if err := l.requireUsable(load, need); err != nil {
		return err
	}
	if err := l.readRange(SourceKernel, kernel, h.kernelOffset, load, h.kernelSize); err != nil {
		return err
	}
	initrd, err := l.placeInitrd(load+memory.GPA(need), memory.GPA(h.initrdMax))
	if err != nil {
		return err
	}
	if err := writeCmdline(l.mem, l.config.Cmdline); err != nil {
		return err
	}
	if err := l.mem.WriteAt(l.zeroPage(head, h, initrd), zeroPageAddr); err != nil {
		return err
	}
	return l.enterLong64(h.loadAddr + entry64)
}

// zeroPage builds struct boot_params.
func (l *loader) zeroPage(head []byte, h setupHeader, initrd memory.Range) []byte {
	le := binary.LittleEndian
	page := make([]byte, memory.PageSize)
	copy(page[offSetupSects:h.headerEnd], head[offSetupSects:h.headerEnd])

	page[offTypeOfLoader] = undefinedLoader
	le.PutUint32(page[offCmdLinePtr:], uint32(cmdlineAddr))
	le.PutUint32(page[offRamdiskImage:], uint32(initrd.Start))
	le.PutUint32(page[offRamdiskSize:], uint32(initrd.Size))
	le.PutUint64(page[offSetupData:], 0)
	le.PutUint64(page[offACPIRSDP:], uint64(l.config.RSDP))

	page[offE820Entries] = byte(len(l.e820))
	for i, e := range l.e820 {
		b := page[offE820Table+i*e820EntrySize:]
		le.PutUint64(b, uint64(e.Start))
		le.PutUint64(b[8:], e.Size)
		le.PutUint32(b[16:], uint32(e.Type))
	}
	return page
}

// enterLong64 writes the tables of long mode and sets the entry state.
func (l *loader) enterLong64(rip uint64) error {
	code, data, task := flatSegments(true)
	gdt, err := writeGDT(l.mem, code, data, task)
	if err != nil {
		return err
	}
	cr3, err := writeIdentityMap(l.mem)
	if err != nil {
		return err
	}
	l.loaded.Entry = Entry{
		Mode: ModeLong64,
		RIP:  rip, RSP: uint64(stackTop), RSI: uint64(zeroPageAddr), RFLAGS: rflagsFixed,
		CR0: cr0PE | cr0ET | cr0NE | cr0PG, CR3: cr3, CR4: cr4PAE, EFER: eferLME | eferLMA,
		GDT: gdt, CS: code, Data: data, TR: task, LDT: Segment{Type: typeLDT},
	}
	return nil
}
