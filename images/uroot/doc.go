// Package uroot builds the initramfs that ditto's guests boot from: u-root's
// commands, the modules that a kernel has not built in, and ditto's own
// process 1 (package guest/init).
//
//	embedded go.mod, go.sum ----+
//	sources of guest/init ------+--> module in a temporary folder
//	                                   |  go build ./init            ~2 MiB static
//	                                   |  go build u-root; u-root    ~16 MiB busybox
//	images/kernel: modules ------------+                             ~1-8 MiB
//	                                   v
//	        <cache>/uroot/<key>/initramfs.cpio, manifest.json
//
// u-root's builder and its dependencies never become part of ditto's own
// process: they are compiled and run as programs of their own, so that the VM
// process stays lean. A Go toolchain is needed the first time, and the module
// proxy unless the module cache is filled. The busybox and the init program
// are cached apart from the modules, so that another kernel costs no compiler.
//
// The archive is not compressed: it boots faster, and large files start at
// page boundaries, so that the pages of the guest's files are pages of the
// archive. The format is newc (Linux Documentation/driver-api/early-userspace/
// buffer-format.rst); names are padded with NULs, which the kernel ignores up
// to PATH_MAX, to align what follows.
//
// In the archive: /init and the links to it (/sbin/modprobe, poweroff, reboot,
// halt, shutdown, boot), /bbin/* of u-root, /lib/modules/RELEASE with modules.dep and
// modules.alias, /etc/ditto/run if a command was given.
package uroot
