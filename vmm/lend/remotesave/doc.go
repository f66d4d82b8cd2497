// Package remotesave saves a machine from another process of its user.
//
//	ditto snapshot                              machine's process
//	  Call --- lend ----> operation "snapshot" --> VM.Save
//	    |                                            |
//	    v   create, commit, abort                    v
//	  vmm.SaveHost  <---- what is asked ----  host: vmm.SaveHost
//	  (savehost)          overlay, drop-overlay      by [lend.Session.Ask]
//	                      open
//
// The machine's process has no right to files. The client opens what the save
// wants and lends the descriptors (package lend).
//
// The client trusts the machine with nothing but the content of what it lends.
// It makes files of a snapshot, by the names that the format has, in the folder
// that its user named; overlays on the disks that the machine began with, or on
// what was stacked on them since; and it opens files of the parent that its user
// named, and of that one's ancestors. The machine checks that what it is lent is
// what it asked for.
package remotesave
