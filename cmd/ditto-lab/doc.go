// Command ditto-lab runs a command in an emulated host that has AMD-V and nested
// paging, with this machine's files visible under a throw-away overlay.
//
//	ditto-lab -- COMMAND [ARG...]
//
// It returns the command's exit status; 124 when the time limit ends it, 125
// when the lab itself fails, 130 and 143 when it is interrupted. See internal/lab for what the lab
// holds.
package main
