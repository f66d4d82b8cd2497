// Package mkdisk makes raw disk images: empty ones of a given size, and ext4
// file systems filled from a folder.
//
//	folder --(walk: blocks, inodes)--> size
//	   |                                 |
//	   +------ mke2fs -d, as a file beside the target ------> fsync, rename
//
// Blocks are always 4 KiB, so that a page of the guest's page cache that equals
// a piece of a file equals an aligned block of the disk (DESIGN.md 4, Names).
// Images are sparse. What exists under its final name is complete; an image
// that another program has open keeps its own inode.
//
// Tools used: mke2fs(8) of e2fsprogs. No rights are needed: nothing is mounted.
package mkdisk
