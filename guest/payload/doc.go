// Package payload makes bare-metal programs that run at CPL 3 at native speed
// on every kind of KVM, even on one that can run no Linux kernel. They need no
// firmware, no interrupts and no devices but two:
//
//	0x3f8  a UART: what the program says, and for some what it is told
//	0xf4   ends the machine with a status (debugexit)
//
// A program is one image that holds its own GDT, TSS and page tables:
//
//	0x100000  descriptors, TSS, both stacks
//	0x101000  status page of the program, for the host to read and write
//	0x102000  code and constants
//	...       page tables: identity map with 2 MiB pages, open to CPL 3
//
// ditto starts it directly in user mode with IOPL 3 ([Program.Load]), so that
// its first instruction is the program's own. QEMU, and any other VMM that
// knows PVH, starts the same image as an ELF file ([Program.ELF]) through a
// stub of some twenty privileged instructions that ends in a SYSRET to CPL 3.
//
// There is no IDT: an exception is a triple fault, which every VMM reports.
//
// The programs are hello (says something and ends), spin (never ends),
// halt (ends at once) and memwriter (see [MemWriter]).
package payload
