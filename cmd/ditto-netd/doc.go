// Ditto-netd is the user-mode network of a ditto VM: NAT, DHCP, DNS and port
// forwards without any privilege.
//
//	VM -- stream socket --> guard --> switch --> TCP/UDP forwarders --> host
//	                       (frames)     |
//	                                 gateway: DHCP, DNS
//	host's ports --> forwards ----------+
//
// It is a process of its own because the network stack is large: the VM
// process must not carry its memory, its start-up cost or its bugs. It serves
// one VM over one socket, inherited (--fd) or created (--listen), with QEMU's
// framing: four bytes of big-endian length, then the Ethernet frame. It ends
// when the socket is closed.
//
// In the guest's network (192.168.127.0/24 unless told otherwise):
//
//	192.168.127.1    gateway, DHCP and DNS server (the host's resolver)
//	192.168.127.2    the guest, when its MAC was given
//	192.168.127.254  the host: its 127.0.0.1 answers there
//
// The DNS server knows host.ditto.internal and gateway.ditto.internal; for
// other names it asks the host's resolver. Names without a dot from the host's
// /etc/hosts do not resolve: Go's resolver does not find them with the trailing
// dot that DNS adds. IPv4 only.
//
// When it is ready, or has given up, it writes one line of JSON
// ([ditto.vm/internal/netd.Status]) to standard output or --status-fd. Exit
// codes: 0 the socket was closed, 1 failure, 2 usage, 3 a host port is taken,
// 4 a host port or address may not be used.
//
// Trust: the peer's bytes are hostile. The guard in front of the network stack
// bounds frames and source addresses; before it reads the first frame the
// process gives up every right but sockets and reading /etc (landlock, no new
// privileges).
package main
