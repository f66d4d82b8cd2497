// Package naming gives a VM's memory names: it joins package names, which knows
// pages and blocks, with the VM's disks, its boot files and its tracker.
//
//	blk.Device --- Before, After ---> disk (blk.Observer) ---+
//	boot.Loaded.Segments -----------> Loaded ----------------+--> names.Table
//	Space.Wrote --------------------> names.Watched ---------+        ^
//	                                    |                             |
//	                                    +--> memory.Tracker <--- names.Prover
//
// A disk is a chain of images. Each of them is a layer of its own, which reads the
// same at the same offsets whatever is stacked on it, and with an index beside it
// names pages that came from anywhere. I/O is that of the top; when that is frozen
// under a new one its names stay, and I/O is the new one's:
//
//	base.img      immutable, has an index      layer 0
//	web.qcow2     the top until a save         layer 1  <- names of I/O until then
//	web.snap.qcow2  the top since              layer 2  <- and from then on
//
// The order of a VM's life:
//
//	New             after the tracker was opened; it takes the tracker's place as
//	                the Space's observer, and Tracker is what everybody else uses
//	AddDisk         before blk.New, whose Config gets the observer
//	AddFile         once; Loaded after every load of it into memory
//	Start, Stop     the prover; it may run while the VM is paused
//	Settle          on the paused VM, devices drained: then what is proven is true
//	Prove, Sources, Changed, Release   a save asks for, with the prover stopped
//	Stacked, Frozen                    the disk's top is not written any more
//	Close           after the last device has stopped and before the Space closes
package naming
