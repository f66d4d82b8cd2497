// Package snapshot is the store of snapshots: their format, a writer, a reader,
// and what keeps a folder of them in order. It knows guest memory and the names
// of its pages; what devices and vCPUs are it leaves to their sections.
//
//	NAME/manifest.json    what it is of: memory, layers, parent, sizes, digests
//	NAME/pagemap          what every page of memory equals, in runs
//	NAME/pages            the bytes of the pages that equal nothing else
//	NAME/sections/*       the state of vCPUs and devices, a file each
//
// docs/snapshot-format.md says what every byte means.
//
// A save has three phases, of which only the second needs the VM to be paused:
//
//	guest runs          paused            runs again
//	AddPages, again --> Capture --------> Commit
//	  bytes, early       the last dirty    digests, fsync, manifest, rename
//	                     pages, names
//
// Whatever fails, and a context that ends, removes what was written: there is a
// whole snapshot under its name or none. A writer that is killed leaves
// .NAME.partial-PID, which the next one takes away.
//
// Trust: everything read is hostile. [Open] checks all of the manifest, the head
// of the page map and the sections before anything is used, so that no later step
// reads outside of memory, of pages or of a layer, or runs without end. Bytes of
// pages are checked against their digests when they are read, and the digests
// against the head, part by part, so that what opening costs does not follow the
// size of memory. [Snapshot.Verify] reads everything. Pages that are mapped are
// checked by nobody: that the layers' files are what they were is known by their
// stamps, and pages, by its size, and else by Verify. Digests are the first 16
// bytes of BLAKE3.
//
// An incremental snapshot names pages of its parent, which it knows by identity:
// the digest over the parent's manifest, and so over all of the parent. Chains
// are at most [MaxChain] long.
package snapshot
