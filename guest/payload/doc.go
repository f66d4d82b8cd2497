// Package payload makes bare-metal programs that run at CPL 3 at native speed
// on every kind of KVM, even one that can run no Linux kernel. They need no
// firmware, no interrupts and no devices but two ports:
//
//	0x3f8  what the program says, byte by byte (COM1, no handshake)
//	0xf4   ends the machine with a status (debugexit)
//
// A program is one image at 1 MiB that holds its own GDT, TSS and page tables
// (identity map of guest RAM). ditto starts it directly in user mode with IOPL 3
// ([Program.Load]); QEMU and any other VMM with PVH starts the same bytes as an
// ELF file ([Program.ELF]) through a 32-bit stub that ends in an IRETQ to CPL 3.
package payload
