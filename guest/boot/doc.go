// Package boot puts a kernel into guest memory and says in which state the
// first vCPU must start.
//
// Two protocols are known, told apart by content and never by file name:
//
//	bzImage  64-bit boot protocol: entry at startup_64 (+0x200), zero page in
//	         RSI, long mode with an identity map of the low 4 GiB
//	         (Documentation/arch/x86/boot.rst, "64-bit Boot Protocol")
//	ELF      PVH: XEN_ELFNOTE_PHYS32_ENTRY, hvm_start_info in EBX, 32-bit
//	         protected mode without paging
//	         (xen/include/public/arch-x86/hvm/start_info.h)
//
// Low memory while a kernel starts; every structure lies in RAM that the E820
// map calls usable and that a kernel reclaims once it has read it:
//
//	0x00500  GDT                    0x09000  page tables (PML4, PDPT, 4 PDs)
//	0x06000  PVH start info         0x20000  command line
//	0x07000  zero page              0x9fc00  reserved up to 1 MiB (ACPI)
//	0x100000 kernel                 top      initrd, as high as it may go
//
// Ownership: [Load] writes guest memory before any vCPU runs and reports every
// byte to the Space's observer. File contents are read straight into guest
// memory; [Loaded].Segments says which page came from which file offset, so
// that pages can be named after the files they equal.
//
// Kernel and initrd bytes are untrusted: each header field is checked before
// it is used, and a bad file is an error of one line that wraps one of the
// sentinels of this package.
package boot
