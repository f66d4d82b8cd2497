// Package guest groups what boots and runs inside a VM:
//
//	guest/boot     boot protocols: bzImage, PVH, the low memory of a fresh guest
//	guest/acpi     the ACPI tables
//	guest/payload  bare-metal payloads for KVMs that cannot run Linux
//	guest/init     process 1 of the u-root images, a program of its own
//
// The package itself only carries the sources of guest/init, so that an
// installed ditto can compile it without its source tree.
package guest
