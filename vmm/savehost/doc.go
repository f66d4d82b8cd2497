// Package savehost is what a save needs of a process that has the rights which
// the machine's process has given up: it makes the snapshot's files, freezes
// disks under new overlays, and opens the parent's files.
//
//	machine (vmm.VM.Save) --- Host ---> Local: the user's own process
//	  pages, sections, manifest           DIR.partial -> DIR       Create, Commit
//	  disks, the top first                disk.img          0444   Overlay
//	                                      disk.DIR.qcow2
//	  parent                              PARENT/manifest.json ..  OpenSnapshotFile
//
// A disk that a snapshot names pages by must never change again. So it loses its
// write permissions, and package disk opens such a file for writing for nobody,
// the superuser included. What the machine writes from then on goes into an
// overlay beside it.
//
// Who asks may have been taken over by its guest: Local makes files only where
// the user said, and opens files of the parent and its ancestors only.
package savehost
