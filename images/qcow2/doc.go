// Package qcow2 reads and writes disk images in QEMU's qcow2 format, versions
// 2 and 3 (QEMU docs/interop/qcow2.rst). It is one file of a backing chain;
// package images/chain puts chains together.
//
//	guest offset --L1--> L2 table --> cluster of the file, zeros, a
//	                                  compressed cluster, or the backing image
//	cluster of the file --refcount table--> refcount block --> references
//
// What it refuses by name: encryption, external data files, extended L2
// entries and every incompatible feature it does not know; for writing also
// internal snapshots, persistent bitmaps and images that are marked corrupt.
//
// # Order of writes
//
// Guest data goes straight to its cluster. Refcounts, L2 and L1 entries change
// in memory and are written by Flush, from one consistent look at them:
//
//	new refcount blocks | refcount table, refcounts, new L2 tables | L2, L1 entries |
//
// where | is a barrier, needed only when there is something on both sides. So
// the file at any moment, whichever of the writes between two barriers have
// arrived, references only clusters that are counted and hold their data. A
// refcount goes down, and its cluster may be used again, only after the last
// reference to it is gone from stable storage and no I/O that may have seen
// it is in flight. A power cut therefore leaves leaked clusters at most. The
// format's dirty bit is set while allocations are under way, although refcounts
// are never behind: it makes the next opening, ditto's or QEMU's, look for
// leaks and free them.
//
// # Concurrency
//
// Every method of [File] may be called from any goroutine, except those that
// say otherwise. Metadata is kept in pages of at most 4 KiB under one mutex,
// which is not held across I/O: an operation that misses a page is
// undone by never having begun, the page is loaded, and it starts over.
// Allocating writes and erasures of the same clusters exclude each other;
// others run side by side.
package qcow2
