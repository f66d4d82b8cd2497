// Command init is process 1 of the emulated host (see internal/lab).
//
//	kernel --> /init (initramfs)
//	             loads modules, mounts the host's root by 9p, lays a tmpfs over
//	             it, mounts the rest, moves in
//	             |
//	             +--> /init agent   runs commands for the host, one per port
//	             |
//	             reaps orphans; switches off when the agent ends
//
// A failure before the root is up ends the machine with a line on the console.
// Later ones are collected and told to the host in the Ready frame.
package main
