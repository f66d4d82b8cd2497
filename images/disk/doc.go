// Package disk opens the raw disks that virtual machines use: image files and
// block devices, with their locks, cache modes and asynchronous I/O.
//
//	Open --> Raw -- ReadAtv, WriteAtv, Flush, Discard, WriteZeroes (wait)
//	          |
//	          +---- NewQueue --> Queue: ring (io_uring), or pool (threads)
//	                                    one per worker, never waits
//
// An [Image] is what a disk chain is made of; formats with a structure of
// their own implement it too. A [Queue] is how a device worker does I/O
// straight between guest memory and the file without waiting for it.
//
// Ownership: whoever opens an image closes it, after its queues. The lock is
// held from Open to Close by the open file itself (OFD locks), on the bytes
// that QEMU uses (block/file-posix.c), so that QEMU, qemu-img and ditto
// exclude each other.
package disk
