// Package naming gives a VM's memory names: it joins package names, which knows
// pages and blocks, with the VM's disks, its boot files and its tracker.
//
//	blk.Device --- Before, After ---> disk (blk.Observer) ---+
//	boot.Loaded.Segments -----------> Loaded ----------------+--> names.Table
//	Space.Wrote --------------------> names.Watched ---------+        ^
//	                                    |                             |
//	                                    +--> memory.Tracker <--- names.Prover
//
// The order of a VM's life:
//
//	New             after the tracker was opened; it takes the tracker's place as
//	                the Space's observer, and Tracker is what everybody else uses
//	AddDisk         before blk.New, whose Config gets the observer
//	AddFile         once; Loaded after every load of it into memory
//	Start, Stop     the prover; it may run while the VM is paused
//	Settle          on the paused VM, devices drained: then what is proven is true
//	Close           after the last device has stopped and before the Space closes
package naming
