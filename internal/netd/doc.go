// Package netd starts and describes ditto-netd, the user-mode network that
// runs as a process of its own.
//
//	VM process                        ditto-netd
//	  virtio-net -- stream socket --> switch --> NAT --> host's sockets
//	  [4-byte big-endian length][Ethernet frame]  DHCP, DNS
//	                                  listeners <-- port forwards
//	  Start <------- status pipe ---- one line of JSON
//
// The package is what the two sides share: the flags that one writes and the
// other reads ([Config]), the status line ([Status]) and the exit codes. It
// imports nothing but the standard library, so that the VM process does not
// pay for the network stack.
//
// Ownership: the caller of [Start] owns the socket and the process. Closing
// the socket ends the process; [Process.Wait] reaps it.
package netd
