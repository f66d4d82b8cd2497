// Package kernel finds Linux kernels to boot: Debian's, fetched and unpacked
// into the cache, or any image by path, each with its modules.
//
//	"6.12-cloud" --> newest cached, or newest of the archive --> Kernel
//	"/boot/vmlinuz-6.1.0-50-amd64" --> that file, modules looked for nearby
//
//	Kernel.Modules("kvm-amd", "ext4") --> modules in the order to load them
//
// Nothing is installed and no depmod index is needed: a module states what it
// depends on in its own .modinfo section. A [Store] may be used by several
// goroutines and processes at once.
package kernel
