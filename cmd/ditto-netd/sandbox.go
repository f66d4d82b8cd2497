package main

import (
	"fmt"
	"runtime/debug"

	"github.com/landlock-lsm/go-landlock/landlock"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// memoryLimit bounds the process in bytes: a guest that opens flows without
// end loses its network, not the host its memory.
const memoryLimit = 1 << 30

// dropRights gives up what the network does not need. What is left are
// sockets, and reading the files that the resolver uses. Kernels without
// landlock keep the file system open to the user's own rights.
func dropRights() error {
	// Of all threads; prctl alone would change only this one.
	if _, _, errno := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); errno != 0 {
		return fmt.Errorf("no_new_privs: %w", errno)
	}
	// Nobody needs a core file or a debugger's view of the guest's traffic.
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("clear dumpable: %w", err)
	}
	limit := unix.Rlimit{Cur: memoryLimit, Max: memoryLimit}
	if err := unix.Setrlimit(unix.RLIMIT_DATA, &limit); err != nil {
		return fmt.Errorf("limit memory: %w", err)
	}
	debug.SetMemoryLimit(memoryLimit / 2)
	err := landlock.V5.BestEffort().RestrictPaths(
		landlock.RODirs("/etc"),
		// Where systemd-resolved and NetworkManager keep resolv.conf.
		landlock.RODirs("/run/systemd/resolve", "/run/NetworkManager", "/run/resolvconf").IgnoreIfMissing(),
	)
	if err != nil {
		return fmt.Errorf("landlock: %w", err)
	}
	return nil
}
