// Package chain opens the disks of virtual machines: a raw or qcow2 image and
// what it is stacked on.
//
//	guest --> top     written by one VM     locked against everybody
//	          layer   qcow2, immutable      locked against writers
//	          bottom  raw or qcow2          locked against writers
//
// The format of the top is found by its content, unless it is given; that of a
// backing file must be named by the image above it, because a guest can make a
// raw disk look like anything. For the same reason a guest's write that would
// turn a raw top into another format is refused if the format was found by
// content.
//
// A [Chain] is a disk.Image and makes queues, so that a device drives it like
// a raw disk. [Chain.Map] tells which [Layer] holds a block, and where in its
// file: memory is named by (layer, block), and a layer reads what a guest
// would read if the layer were its disk. All layers share the offsets of the
// disk.
//
// [Chain.Stack] puts a new overlay on top at a moment when nothing is in
// flight: the former top is immutable from then on.
package chain
