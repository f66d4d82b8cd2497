package boot

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/memory"

	"github.com/google/go-cmp/cmp"
	"github.com/u-root/u-root/pkg/boot/bzimage"
)

// checkSegments compares every reported segment with its file.
func checkSegments(t *testing.T, mem *memory.Space, loaded *Loaded, kernel, initrd []byte) {
	t.Helper()
	if len(loaded.Segments) == 0 {
		t.Error("no segments reported")
	}
	for _, s := range loaded.Segments {
		file := kernel
		if s.Source == SourceInitrd {
			file = initrd
		}
		got, err := mem.View(s.GPA, s.Size)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, file[s.Offset:s.Offset+int64(s.Size)]) {
			t.Errorf("%s at %s differs from the file at %#x", s.Source, s.GPA, s.Offset)
		}
	}
}

func TestLoadBzImage(t *testing.T) {
	mem := newSpace(t, 128<<20)
	kernel, initrd := bzImage(), bytes.Repeat([]byte("initrd"), 1000)
	ecam := memory.Range{Start: 0xe0000000, Size: 1 << 20}
	loaded, err := Load(mem, Config{
		Kernel: imageOf("vmlinuz", kernel), Initrd: imageOf("initrd", initrd),
		Cmdline: "console=ttyS0", RSDP: 0xe0000, Reserved: []memory.Range{ecam},
	})
	if err != nil {
		t.Fatal(err)
	}
	checkSegments(t, mem, loaded, kernel, initrd)
	initrdAt := memory.GPA(128<<20-len(initrd)) &^ 0xfff
	want := []FileRange{
		{SourceKernel, 16 << 20, 0x800, 0x1000},
		{SourceInitrd, initrdAt, 0, uint64(len(initrd))},
	}
	if diff := cmp.Diff(want, loaded.Segments); diff != "" {
		t.Error("segments:", diff)
	}
	e := loaded.Entry
	if loaded.Protocol != ProtocolLinux64 || e.Mode != ModeLong64 || e.RIP != 16<<20+0x200 || e.RSI != uint64(zeroPageAddr) {
		t.Errorf("protocol %s, entry %+v", loaded.Protocol, e)
	}
	if e.CS.Selector != 0x10 || !e.CS.L || e.CS.DB || e.Data.Selector != 0x18 {
		t.Errorf("segments of the boot protocol: CS %+v, data %+v", e.CS, e.Data)
	}

	page, err := mem.View(zeroPageAddr, memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	if got := le.Uint64(page[offACPIRSDP:]); got != 0xe0000 {
		t.Errorf("acpi_rsdp_addr = %#x", got)
	}
	if at, n := le.Uint32(page[offRamdiskImage:]), le.Uint32(page[offRamdiskSize:]); memory.GPA(at) != initrdAt || int(n) != len(initrd) {
		t.Errorf("ramdisk at %#x, %d bytes", at, n)
	}
	if page[offTypeOfLoader] != 0xff || string(page[offHeader:offHeader+4]) != "HdrS" {
		t.Error("setup header was not copied, or the loader type is not set")
	}
	if got := page[0x200+0x6c : offE820Table]; !bytes.Equal(got, make([]byte, len(got))) {
		t.Errorf("bytes behind the setup header are not zero: % x", got)
	}
	cmdline, err := mem.View(memory.GPA(le.Uint32(page[offCmdLinePtr:])), 14)
	if err != nil || string(cmdline) != "console=ttyS0\x00" {
		t.Errorf("command line %q, %v", cmdline, err)
	}
	wantMap := []E820Entry{
		{memory.Range{Start: 0, Size: 0x9fc00}, E820RAM},
		{memory.Range{Start: 0x9fc00, Size: 0x60400}, E820Reserved},
		{memory.Range{Start: 1 << 20, Size: 127 << 20}, E820RAM},
		{ecam, E820Reserved},
	}
	if diff := cmp.Diff(wantMap, loaded.E820); diff != "" {
		t.Error("memory map:", diff)
	}
	for i, w := range wantMap {
		b := page[offE820Table+20*i:]
		got := E820Entry{memory.Range{Start: memory.GPA(le.Uint64(b)), Size: le.Uint64(b[8:])}, E820Type(le.Uint32(b[16:]))}
		if got != w {
			t.Errorf("zero page map[%d] = %+v, want %+v", i, got, w)
		}
	}
	if int(page[offE820Entries]) != len(wantMap) {
		t.Errorf("e820_entries = %d", page[offE820Entries])
	}
	checkIdentityMap(t, mem, e.CR3)
	checkGDT(t, mem, e, 0x00af9b000000ffff, 0x00cf93000000ffff)
}

// checkIdentityMap walks the page tables for addresses all over 4 GiB.
func checkIdentityMap(t *testing.T, mem *memory.Space, cr3 uint64) {
	t.Helper()
	read := func(table uint64, index uint64) uint64 {
		b, err := mem.View(memory.GPA(table+8*index), 8)
		if err != nil {
			t.Fatal(err)
		}
		return binary.LittleEndian.Uint64(b)
	}
	for va := uint64(0); va < 4<<30; va += 62<<20 + 12345 {
		pml4e := read(cr3, va>>39&511)
		pdpte := read(pml4e&^0xfff, va>>30&511)
		pde := read(pdpte&^0xfff, va>>21&511)
		if pml4e&3 != 3 || pdpte&3 != 3 || pde&0x83 != 0x83 {
			t.Fatalf("%#x is not mapped writable by a large page: %#x %#x %#x", va, pml4e, pdpte, pde)
		}
		if got := pde&^0x1fffff | va&0x1fffff; got != va {
			t.Fatalf("%#x maps to %#x", va, got)
		}
	}
	if read(cr3, 1)|read(read(cr3, 0)&^0xfff, 4) != 0 {
		t.Error("more than 4 GiB are mapped")
	}
}

// checkGDT compares the descriptors that the selectors of e name.
func checkGDT(t *testing.T, mem *memory.Space, e Entry, code, data uint64) {
	t.Helper()
	gdt, err := mem.View(memory.GPA(e.GDT.Base), uint64(e.GDT.Limit)+1)
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	if got := le.Uint64(gdt[e.CS.Selector:]); got != code {
		t.Errorf("code descriptor %#016x, want %#016x", got, code)
	}
	if got := le.Uint64(gdt[e.Data.Selector:]); got != data {
		t.Errorf("data descriptor %#016x, want %#016x", got, data)
	}
	if got := le.Uint64(gdt[e.TR.Selector:]); got != 0x00008b0000000067 {
		t.Errorf("TSS descriptor %#016x", got)
	}
}

func TestLoadPVH(t *testing.T) {
	mem := newSpace(t, 64<<20)
	kernel, initrd := elfKernel(), bytes.Repeat([]byte("x"), 5000)
	bss, _ := mem.Writable(16<<20+0x800, 0x2800)
	for i := range bss {
		bss[i] = 0xaa // left over from before a reboot
	}
	loaded, err := Load(mem, Config{Kernel: imageOf("vmlinux", kernel), Initrd: imageOf("initrd", initrd), Cmdline: "quiet", RSDP: 0xe0000})
	if err != nil {
		t.Fatal(err)
	}
	checkSegments(t, mem, loaded, kernel, initrd)
	if !bytes.Equal(bss, make([]byte, len(bss))) {
		t.Error("BSS was not cleared")
	}
	e := loaded.Entry
	if e.Mode != ModeProtected32 || e.RIP != elfEntryPA || e.RBX != uint64(startInfoAddr) || e.CR0 != cr0PE|cr0ET || e.CR4|e.EFER|e.CR3 != 0 {
		t.Errorf("entry %+v", e)
	}
	checkGDT(t, mem, e, 0x00cf9b000000ffff, 0x00cf93000000ffff)

	le := binary.LittleEndian
	info, err := mem.View(startInfoAddr, memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	if le.Uint32(info) != 0x336ec578 || le.Uint32(info[4:]) != 1 || le.Uint32(info[12:]) != 1 || le.Uint64(info[32:]) != 0xe0000 {
		t.Errorf("start info % x", info[:56])
	}
	cmdline, err := mem.View(memory.GPA(le.Uint64(info[24:])), 6)
	if err != nil || string(cmdline) != "quiet\x00" {
		t.Errorf("command line %q, %v", cmdline, err)
	}
	module, err := mem.View(memory.GPA(le.Uint64(info[16:])), modlistSize)
	if err != nil || le.Uint64(module) != uint64(loaded.Segments[1].GPA) || le.Uint64(module[8:]) != 5000 {
		t.Errorf("module % x, %v", module, err)
	}
	memmap, err := mem.View(memory.GPA(le.Uint64(info[40:])), memmapSize*uint64(le.Uint32(info[48:])))
	if err != nil || len(memmap) != memmapSize*len(loaded.E820) {
		t.Fatalf("memory map of %d bytes, %v", len(memmap), err)
	}
	for i, w := range loaded.E820 {
		b := memmap[memmapSize*i:]
		if memory.GPA(le.Uint64(b)) != w.Start || le.Uint64(b[8:]) != w.Size || le.Uint32(b[16:]) != uint32(w.Type) {
			t.Errorf("memory map[%d] = % x, want %+v", i, b[:memmapSize], w)
		}
	}
}

// TestLoadCorpus loads real kernels of every compression.
func TestLoadCorpus(t *testing.T) {
	for _, path := range corpus(t) {
		t.Run(filepath.Base(path), func(t *testing.T) {
			mem := newSpace(t, 512<<20)
			image, err := OpenImage(path)
			if err != nil {
				t.Fatal(err)
			}
			defer image.Close()
			initrd := bytes.Repeat([]byte{1}, 3<<20)
			loaded, err := Load(mem, Config{Kernel: image, Initrd: imageOf("initrd", initrd), Cmdline: "quiet"})
			if err != nil {
				t.Fatal(err)
			}
			checkSegments(t, mem, loaded, readFile(t, path), initrd)
			if loaded.Protocol != ProtocolLinux64 {
				t.Errorf("protocol %s", loaded.Protocol)
			}
		})
	}
}

// TestLoadCorpusByPVH decompresses a real kernel and loads the ELF file.
func TestLoadCorpusByPVH(t *testing.T) {
	for _, path := range corpus(t) {
		if !strings.HasSuffix(path, "debian-signed-linux5.10.0-6-amd64_5.10.28-1_amd64") {
			continue
		}
		var bz bzimage.BzImage
		if err := bz.UnmarshalBinary(readFile(t, path)); err != nil {
			t.Fatal(err)
		}
		mem := newSpace(t, 256<<20)
		loaded, err := Load(mem, Config{Kernel: imageOf("vmlinux", bz.KernelCode)})
		if err != nil {
			t.Fatal(err)
		}
		checkSegments(t, mem, loaded, bz.KernelCode, nil)
		if loaded.Protocol != ProtocolPVH || len(loaded.Segments) < 3 {
			t.Errorf("protocol %s, segments %+v", loaded.Protocol, loaded.Segments)
		}
		return
	}
	t.Fatal("the Debian kernel is not in the corpus")
}

// pages collects the frames that an observer hears of.
type pages map[memory.GFN]bool

func (p pages) HostWrite(gpa memory.GPA, n uint64) {
	for f := gpa.GFN(); f <= (gpa + memory.GPA(n) - 1).GFN(); f++ {
		p[f] = true
	}
}

func TestEveryWriteIsReported(t *testing.T) {
	for name, kernel := range map[string][]byte{"bzImage": bzImage(), "PVH": elfKernel()} {
		t.Run(name, func(t *testing.T) {
			mem := newSpace(t, 32<<20)
			all, err := mem.Writable(0, 32<<20)
			if err != nil {
				t.Fatal(err)
			}
			before := bytes.Repeat([]byte{0xaa}, memory.PageSize)
			for i := 0; i < len(all); i += memory.PageSize {
				copy(all[i:], before)
			}
			heard := pages{}
			mem.SetObserver(heard)
			if _, err := Load(mem, Config{Kernel: imageOf("k", kernel), Initrd: imageOf("i", []byte("initrd")), Cmdline: "x"}); err != nil {
				t.Fatal(err)
			}
			for gpa := memory.GPA(0); gpa < 32<<20; gpa += memory.PageSize {
				if !bytes.Equal(all[gpa:gpa+memory.PageSize], before) && !heard[gpa.GFN()] {
					t.Errorf("write to %s was not reported", gpa)
				}
			}
		})
	}
}

func TestInitrdBelowAddrMax(t *testing.T) {
	mem := newSpace(t, 128<<20)
	kernel := bzImage(put32(offInitrdAddrMax, 0x37fffff))
	loaded, err := Load(mem, Config{Kernel: imageOf("k", kernel), Initrd: imageOf("i", make([]byte, 0x1001))})
	if err != nil {
		t.Fatal(err)
	}
	if got := loaded.Segments[1].GPA; got != 0x37fe000 {
		t.Errorf("initrd at %s", got)
	}
}

func TestInitrdStaysBelowTheHole(t *testing.T) {
	mem := newSpace(t, 6<<30)
	loaded, err := Load(mem, Config{
		Kernel: imageOf("k", bzImage(put32(offInitrdAddrMax, 0xffffffff))), Initrd: imageOf("i", make([]byte, 0x1000)),
	})
	if err != nil {
		t.Fatal(err)
	}
	if got := loaded.Segments[1].GPA; got != memory.HoleStart-0x1000 {
		t.Errorf("initrd at %s", got)
	}
	last := loaded.E820[len(loaded.E820)-1]
	if last.Start != memory.HoleEnd || last.Size != 3<<30 || last.Type != E820RAM {
		t.Errorf("high RAM is %+v", last)
	}
}

func TestBadInput(t *testing.T) {
	note, load := elfHeaderSize, elfHeaderSize+progHeaderSize
	text := func(at int, s string) patch { return func(b []byte) { copy(b[at:], s) } }
	tests := []struct {
		name   string
		kernel []byte
		initrd []byte
		cmd    string
		want   error
		says   string
	}{
		{name: "empty", kernel: []byte{}, want: ErrNotKernel, says: "empty"},
		{name: "text", kernel: []byte("#!/bin/sh\n"), want: ErrNotKernel},
		{name: "zeros", kernel: make([]byte, 1<<16), want: ErrNotKernel},
		{name: "arm64 Image", kernel: func() []byte { b := make([]byte, 4096); text(0x38, "ARM\x64")(b); return b }(), want: ErrArchitecture, says: "arm64"},
		{name: "gzip", kernel: []byte("\x1f\x8b\x08 and so on"), want: ErrNotKernel, says: "gzip"},
		{name: "initrd given as kernel", kernel: []byte("070701 and so on"), want: ErrNotKernel, says: "cpio"},
		{name: "32-bit bzImage", kernel: bzImage(put16(offXloadflags, 0)), want: ErrArchitecture, says: "32-bit"},
		{name: "old protocol", kernel: bzImage(put16(offVersion, 0x0204)), want: ErrArchitecture, says: "2.04"},
		{name: "zImage", kernel: bzImage(put8(offLoadflags, 0)), want: ErrNotKernel},
		{name: "truncated bzImage", kernel: bzImage()[:0x1000], want: ErrTruncated},
		{name: "truncated setup header", kernel: bzImage()[:0x210], want: ErrTruncated},
		{name: "only setup", kernel: bzImage(put32(offSyssize, 0))[:0x800], want: ErrTruncated},
		{name: "header end", kernel: bzImage(put8(offJump+1, 2)), want: ErrNotKernel},
		{name: "low preferred address", kernel: bzImage(put64(offPrefAddress, 0)), want: ErrNotKernel},
		{name: "wild preferred address", kernel: bzImage(put64(offPrefAddress, 1<<63)), want: ErrNotKernel},
		{name: "unaligned preferred address", kernel: bzImage(put64(offPrefAddress, 17<<20)), want: ErrNotKernel},
		{name: "large init_size", kernel: bzImage(put32(offInitSize, 100<<20)), want: ErrNoRoom, says: "at least 116 MiB"},
		{name: "huge init_size", kernel: bzImage(put32(offInitSize, 0xffffffff)), want: ErrNoRoom},
		{name: "long command line", kernel: bzImage(put32(offCmdlineSize, 3)), cmd: "abcd", want: ErrCmdline, says: "4 bytes"},
		{name: "NUL in command line", kernel: bzImage(), cmd: "a\x00b", want: ErrCmdline},
		{name: "endless command line", kernel: bzImage(put32(offCmdlineSize, 0xffffffff)), cmd: strings.Repeat("a", 1<<20), want: ErrCmdline},
		{name: "large initrd", kernel: bzImage(), initrd: make([]byte, 41<<20), want: ErrNoRoom, says: "at least 66 MiB"},
		{name: "initrd above initrd_addr_max", kernel: bzImage(put32(offInitrdAddrMax, 20<<20)), initrd: make([]byte, 4096), want: ErrNoRoom},
		{name: "initrd_addr_max 0", kernel: bzImage(put32(offInitrdAddrMax, 0)), initrd: make([]byte, 4096), want: ErrNoRoom},
		{name: "empty initrd", kernel: bzImage(), initrd: []byte{}, want: ErrTruncated},

		{name: "truncated ELF", kernel: elfKernel()[:40], want: ErrTruncated},
		{name: "arm64 ELF", kernel: elfKernel(put16(18, 183)), want: ErrArchitecture, says: "arm64"},
		{name: "32-bit ELF", kernel: elfKernel(put8(4, 1), put16(18, 3)), want: ErrArchitecture, says: "32-bit x86"},
		{name: "big-endian ELF", kernel: elfKernel(put8(5, 2)), want: ErrArchitecture},
		{name: "no program headers", kernel: elfKernel(put16(56, 0)), want: ErrNotKernel},
		{name: "program headers outside", kernel: elfKernel(put64(32, 1<<62)), want: ErrTruncated},
		{name: "segment cut off", kernel: elfKernel()[:elfCode+0x400], want: ErrTruncated},
		{name: "file size above memory size", kernel: elfKernel(put64(load+40, 1)), want: ErrNotKernel},
		{name: "wrapping segment", kernel: elfKernel(put64(load+24, 1<<63), put64(load+40, 1<<63+1)), want: ErrNotKernel},
		{name: "segment above RAM", kernel: elfKernel(put64(load+40, 100<<20)), want: ErrNoRoom, says: "at least 116 MiB"},
		{name: "segment over the zero page", kernel: elfKernel(put64(load+24, 0x7000)), want: ErrNotKernel},
		{name: "no note", kernel: elfKernel(put32(note, progLoad), put64(note+24, 1<<20)), want: ErrNoPVH, says: "CONFIG_PVH"},
		{name: "other note", kernel: elfKernel(put32(elfNotes+8, 17)), want: ErrNoPVH},
		{name: "note above 4 GiB", kernel: elfKernel(put64(elfNotes+16, 1<<32)), want: ErrNoPVH},
		{name: "wild note size", kernel: elfKernel(put32(elfNotes+4, 0xffffffff)), want: ErrNoPVH},
		{name: "huge note segment", kernel: append(elfKernel(put64(note+32, maxNotes+1)), make([]byte, maxNotes)...), want: ErrNotKernel},
		{name: "entry in no segment", kernel: elfKernel(put64(elfNotes+16, 0x2000000)), want: ErrNotKernel},
		{name: "entry in BSS", kernel: elfKernel(put64(elfNotes+16, 16<<20+0x900)), want: ErrNotKernel},
	}
	mem := newSpace(t, 64<<20)
	for _, test := range tests {
		t.Run(test.name, func(t *testing.T) {
			config := Config{Kernel: imageOf("/k", test.kernel), Cmdline: test.cmd}
			if test.initrd != nil {
				config.Initrd = imageOf("/i", test.initrd)
			}
			_, err := Load(mem, config)
			if !errors.Is(err, test.want) {
				t.Fatalf("got %v, want %v", err, test.want)
			}
			if !strings.Contains(err.Error(), test.says) || strings.ContainsRune(err.Error(), '\n') {
				t.Errorf("message %q does not say %q in one line", err, test.says)
			}
			checked := Check(config.Kernel)
			if checked != nil && checked.Error() != err.Error() {
				t.Errorf("Check says %q, Load %q", checked, err)
			}
			if checked == nil && errors.Is(err, ErrArchitecture) {
				t.Error("Check takes a kernel for another architecture")
			}
		})
	}
}

func TestCheckTakesKernels(t *testing.T) {
	for name, kernel := range map[string][]byte{"bzImage": bzImage(), "PVH": elfKernel()} {
		if err := Check(imageOf(name, kernel)); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestShrinkingFile covers a file that became shorter after it was opened.
func TestShrinkingFile(t *testing.T) {
	mem := newSpace(t, 64<<20)
	for name, kernel := range map[string][]byte{"bzImage": bzImage(), "PVH": elfKernel()} {
		image := imageOf(name, kernel[:len(kernel)-100])
		image.Size = int64(len(kernel))
		if _, err := Load(mem, Config{Kernel: image}); !errors.Is(err, ErrTruncated) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// failing is a file on a bad disk.
type failing struct{ err error }

func (f failing) ReadAt([]byte, int64) (int, error) { return 0, f.err }

func TestUnreadableFile(t *testing.T) {
	want := fmt.Errorf("bad sector")
	image := &Image{Name: "/k", Reader: failing{want}, Size: 1 << 20}
	if _, err := Load(newSpace(t, 4<<20), Config{Kernel: image}); !errors.Is(err, want) {
		t.Error(err)
	}
}

func TestTooSmallMemory(t *testing.T) {
	if _, err := Load(newSpace(t, 1<<20), Config{Kernel: imageOf("/k", bzImage())}); !errors.Is(err, ErrNoRoom) {
		t.Error(err)
	}
}

func TestOpenImage(t *testing.T) {
	dir := t.TempDir()
	if _, err := OpenImage(filepath.Join(dir, "none")); !errors.Is(err, ErrMissing) {
		t.Errorf("missing file: %v", err)
	}
	if _, err := OpenImage(dir); !errors.Is(err, ErrNotRegular) {
		t.Errorf("directory: %v", err)
	}
	if _, err := Load(newSpace(t, 4<<20), Config{}); !errors.Is(err, ErrMissing) {
		t.Errorf("no kernel: %v", err)
	}
}

// BenchmarkLoad loads a distribution's kernel and an initrd of 32 MiB.
func BenchmarkLoad(b *testing.B) {
	for _, path := range corpus(b) {
		if !strings.HasSuffix(path, "rockylinux9") {
			continue
		}
		kernel, err := OpenImage(path)
		if err != nil {
			b.Fatal(err)
		}
		defer kernel.Close()
		initrd := imageOf("initrd", make([]byte, 32<<20))
		mem := newSpace(b, 512<<20)
		b.SetBytes(kernel.Size + initrd.Size)
		for b.Loop() {
			if _, err := Load(mem, Config{Kernel: kernel, Initrd: initrd}); err != nil {
				b.Fatal(err)
			}
		}
	}
}
