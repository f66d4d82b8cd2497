// Package balloon is the virtio memory balloon (virtio 1.2 5.5): the guest
// gives pages to the host and takes them back, tells how it uses its memory,
// and reports pages that it has freed.
//
//	SetTarget --config--> driver --inflateq--> worker --> memory.Space.Discard
//	                      driver --deflateq--> worker      |
//	                      driver --reporting-> worker -----+--> observer
//	Stats <---------------driver --statsq----> worker <-- timer
//
// A page in the balloon is a hole in the host's memory. It reads as zeros when
// the guest touches it again, whether or not it asked for it first, so deflating
// costs the host nothing. Whoever tracks or names pages hears of each discarded
// range by the memory's write observer; who must not fill the holes, such as the
// keeper of large frames, is told by [Holder] which pages the balloon holds.
//
// The driver deflates by itself when the guest would otherwise run out of
// memory (DEFLATE_ON_OOM): a target is a wish.
//
// Ownership: the worker owns the queues. The target, the statistics interval
// and the last statistics outlive a reset of the device.
package balloon
