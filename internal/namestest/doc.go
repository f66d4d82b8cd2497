// Package namestest holds the names of pages to what they claim, with real parts:
// a virtio block device on an image file, a balloon, the kernel's tracker, the
// prover, and vCPUs that store meanwhile.
//
//	drivers --> blk.Device --> gates --> image file <-- second descriptor
//	               |                                          |
//	               v                                          v
//	vCPUs -----> memory <---- tracker, prover ----> names == bytes?
//
// The race lets everything happen at once and compares every name with the bytes
// of its block at pauses. The schedules let it happen in one order, chosen with
// gates that hold single requests, and do it twice: with every hook in place
// nothing may be wrong, and with one hook left out, early or late a wrong name
// must be found.
package namestest
