// Package lab boots an emulated host that has AMD-V and nested paging, and runs
// commands in it. It is for machines whose own /dev/kvm cannot run Linux.
//
//	this process                    QEMU (TCG)
//	  Start ---------- kernel, initramfs ------> Linux 6.12, kvm_amd, init
//	  Run  <====== one virtio-serial port =====> agent, one per running command
//	  Kill --- SIGKILL                             |
//	                                    root: host's / (9p, read-only) + tmpfs
//	                                    /lab: ext4 on a scratch disk
//	                                    /lab-share: Lab.ShareDir, read-write
//	                                    /dev/lab/disk0...: Options.Disks
//
// Every file of the machine is there, under its own path; nothing that a command
// writes survives, except below [ShareDir] and on the caller's disks.
//
// # Files that change while a lab runs
//
// The host's root is mounted with cache=loose, which is what makes it fast, and
// never looks again at a file it has read. A lab therefore sees a file as it was
// when it first read it. [Lab.Run] notices when the program it is to run was
// rebuilt since an earlier Run of the same lab, and runs a copy under a fresh
// path. Other files that change go through the share, which is not cached:
// [Lab.Copy] puts a copy there and returns its path inside.
//
// # Ownership
//
// The Lab owns QEMU, a folder below the cache with everything temporary, and the
// streams. [Lab.Close] joins them all. QEMU dies with the process that started
// it; the folders of processes that were killed are swept by the next Start.
package lab
