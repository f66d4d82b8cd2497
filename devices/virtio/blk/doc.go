// Package blk is the virtio block device (virtio 1.2 5.2): several queues,
// read, write, flush, discard, write-zeroes, serial number, read-only disks,
// topology and a write-back cache that the driver may switch.
//
//	queue i --Pop--> worker i --parse--> IOQueue i --> io_uring or threads
//	   ^                |                    |
//	   +-- Push, one Publish a batch <-------+ completions
//
// Ownership: one worker owns one virtqueue, its request slots and its
// [IOQueue]. The disk itself belongs to whoever made the device.
//
// Order: a request completes towards the guest only after the disk says it is
// done. A flush is a fdatasync that begins after every write that the guest
// was told of, so it covers them. While the driver has the write-back cache
// off, each write, discard and write-zeroes is stable before it completes.
//
// A read or write of whole pages tells the [Observer], which gives pages the
// names of the blocks they equal, in the order that makes a name safe: dropped
// before the read, recorded before the guest is told.
package blk
