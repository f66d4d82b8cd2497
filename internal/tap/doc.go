// Package tap opens and configures host tap interfaces for virtio-net.
//
//	Open -> /dev/net/tun, TUNSETIFF -> descriptor for devices/virtio/net
//	     -> netlink: MTU, bridge, up
//
// Everything that needs a name, a path or a right happens in [Open], before
// the VM process drops its rights; the device afterwards only reads, writes
// and polls the descriptor. It is a package of its own because nothing but
// opening a tap needs netlink.
//
// Ownership: the caller closes [Tap.FD]. An interface that Open created goes
// away with it; one that was there before stays.
package tap
