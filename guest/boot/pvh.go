package boot

import (
	"encoding/binary"
	"fmt"

	"ditto.vm/memory"
)

// hvm_start_info, version 1, and what it points to
// (xen/include/public/arch-x86/hvm/start_info.h).
const (
	startInfoMagic   = 0x336ec578
	startInfoVersion = 1

	modlistOffset = 0x40
	modlistSize   = 32 // struct hvm_modlist_entry
	memmapOffset  = 0x80
	memmapSize    = 24 // struct hvm_memmap_table_entry
)

// maxPVHCmdline is Linux's COMMAND_LINE_SIZE on x86 without the NUL: its PVH
// entry cuts a longer line without a word, and the ELF file has no field that
// says how much the kernel takes.
const maxPVHCmdline = 2047

// maxPVHInitrd is the highest address of an initrd by PVH: Linux maps it like
// the boot protocol's, below 4 GiB.
const maxPVHInitrd = memory.HoleStart - 1

// loadPVH loads an ELF kernel for its PVH entry point.
func (l *loader) loadPVH(head []byte) error {
	kernel := l.config.Kernel
	headers, err := parseELF(kernel, head)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", kernel.Name, err)
	}
	entry, err := findPVHEntry(kernel, headers)
	if err != nil {
		return fmt.Errorf("kernel %s: %w", kernel.Name, err)
	}
	if len(l.config.Cmdline) > maxPVHCmdline {
		return tooLong(l.config.Cmdline, maxPVHCmdline)
	}
	end, err := l.loadSegments(headers, entry)
	if err != nil {
		return err
	}
	initrd, err := l.placeInitrd(end, maxPVHInitrd)
	if err != nil {
		return err
	}
	if err := writeCmdline(l.mem, l.config.Cmdline); err != nil {
		return err
	}
	if err := l.mem.WriteAt(l.startInfo(initrd), startInfoAddr); err != nil {
		return err
	}
	return l.enterProtected32(entry)
}

// loadSegments reads the PT_LOAD segments to their physical addresses and
// returns the end of the highest. The entry point must lie in file bytes of
// one of them.
func (l *loader) loadSegments(headers []progHeader, entry uint32) (memory.GPA, error) {
	kernel := l.config.Kernel
	var end memory.GPA
	entryLoaded := false
	for _, p := range headers {
		if p.kind != progLoad || p.memSize == 0 {
			continue
		}
		start := memory.GPA(p.paddr)
		if start < lowEnd {
			return 0, fmt.Errorf("kernel %s: segment at %s overlaps the boot structures below 1 MiB: %w", kernel.Name, start, ErrNotKernel)
		}
		if err := l.requireUsable(start, p.memSize); err != nil {
			return 0, err
		}
		if err := l.readRange(SourceKernel, kernel, int64(p.offset), start, p.fileSize); err != nil {
			return 0, err
		}
		if err := l.zeroRange(start+memory.GPA(p.fileSize), p.memSize-p.fileSize); err != nil {
			return 0, err
		}
		entryLoaded = entryLoaded || memory.Range{Start: start, Size: p.fileSize}.Contains(memory.GPA(entry), 1)
		end = max(end, start+memory.GPA(p.memSize))
	}
	if !entryLoaded {
		return 0, fmt.Errorf("kernel %s: PVH entry point %#x is in no segment: %w", kernel.Name, entry, ErrNotKernel)
	}
	return end, nil
}

// startInfo builds hvm_start_info with its module list and memory map.
func (l *loader) startInfo(initrd memory.Range) []byte {
	le := binary.LittleEndian
	b := make([]byte, memmapOffset+len(l.e820)*memmapSize)
	le.PutUint32(b[0:], startInfoMagic)
	le.PutUint32(b[4:], startInfoVersion)
	if initrd.Size > 0 {
		le.PutUint32(b[12:], 1) // nr_modules
		le.PutUint64(b[16:], uint64(startInfoAddr)+modlistOffset)
		le.PutUint64(b[modlistOffset:], uint64(initrd.Start))
		le.PutUint64(b[modlistOffset+8:], initrd.Size)
	}
	le.PutUint64(b[24:], uint64(cmdlineAddr))
	le.PutUint64(b[32:], uint64(l.config.RSDP))
	le.PutUint64(b[40:], uint64(startInfoAddr)+memmapOffset)
	le.PutUint32(b[48:], uint32(len(l.e820)))
	for i, e := range l.e820 {
		m := b[memmapOffset+i*memmapSize:]
		le.PutUint64(m, uint64(e.Start))
		le.PutUint64(m[8:], e.Size)
		le.PutUint32(m[16:], uint32(e.Type))
	}
	return b
}

// enterProtected32 writes the GDT and sets the entry state of PVH.
func (l *loader) enterProtected32(eip uint32) error {
	code, data, task := flatSegments(false)
	gdt, err := writeGDT(l.mem, code, data, task)
	if err != nil {
		return err
	}
	l.loaded.Entry = Entry{
		Mode: ModeProtected32,
		RIP:  uint64(eip), RBX: uint64(startInfoAddr), RFLAGS: rflagsFixed,
		CR0: cr0PE | cr0ET,
		GDT: gdt, CS: code, Data: data, TR: task, LDT: Segment{Type: typeLDT},
	}
	return nil
}
