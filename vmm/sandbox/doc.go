// Package sandbox takes from the machine's process, before the first guest
// instruction, every right that it does not need to run the guest.
//
//	open everything: KVM, memory, disks, taps, sockets, logs
//	      |
//	    Apply:  no_new_privs      no program gains rights from here
//	            capabilities      none, on every thread
//	            core files        none: they would hold guest memory
//	            landlock          no path but those of the policy; no TCP
//	            seccomp           only the system calls of the list below
//	      |
//	    guest runs
//
// A guest that takes over the process (vCPU threads run hostile code) then
// holds descriptors of its own disks and network, and little else: it cannot
// open, connect, execute, trace or signal anything.
//
// What the filters do with a forbidden call:
//   - execve and execveat kill the process. Nothing in ditto executes a program
//     after Apply, so the call proves a take-over.
//   - everything else fails with EPERM. The list was made for today's Go
//     runtime and kernel; a new one that tries a system call it can do without
//     must not cost anybody a running guest.
//   - clone3 fails with ENOSYS, which C libraries answer with clone, whose flags
//     the filter can see.
//
// Landlock is best effort: on a kernel without it the path rules are missing
// and Apply says so ([Report]). Seccomp is required.
//
// go-seccomp-bpf compares the next system call's number against an argument
// after a call's conditions did not hold: its accumulator is not reloaded. So a
// list that mixes conditions with more entries would let through what it should
// not. Each condition is therefore a filter of its own that denies; the kernel
// runs all filters and takes the strictest answer (seccomp(2)).
//
// All of it applies to all threads, present and future, and cannot be undone.
package sandbox
