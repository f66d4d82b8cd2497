// Package rootfs makes disks with a Debian root file system, for guests that
// are more than a u-root shell.
//
//	images/debian: mirror, suites --> mmdebstrap --(folder)--> configure --> images/mkdisk
//	                                                              |
//	                            fstab, networkd, console, users, kernel, boot menu
//
// The guest has systemd, DHCP on every Ethernet interface, a login prompt on
// the kernel's console, and powers off when its button is pressed (logind). It
// honours ditto.run= and ditto.run64= as the u-root image does (see guest/init)
// by a unit of its own.
//
// Without a kernel inside, boot it with any of images/kernel and an image of
// images/uroot: root=LABEL=rootfs. With one, /boot holds a kernel, its initrd
// and a boot menu that u-root's boot command reads.
//
// Making one needs root, because the owners of its files are the guest's.
//
// Tools used: mmdebstrap(1), mke2fs(8), chroot(8).
package rootfs
