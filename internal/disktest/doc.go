// Package disktest holds the tests and benchmarks of the whole way of a block
// request: driver, virtqueue, virtio-blk, I/O queue, file. The two halves,
// devices/virtio/blk and images/disk, do not know each other.
package disktest
