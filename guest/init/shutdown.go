package main

import (
	"bufio"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// shutDown ends every process, flushes and unmounts the disks and hands the
// machine to the kernel. It does not return unless the kernel refuses.
func shutDown(log *logger, act action, reason string, grace time.Duration) {
	_ = syscall.Kill(-1, syscall.SIGTERM)
	_ = syscall.Kill(-1, syscall.SIGHUP) // interactive shells ignore TERM
	_ = syscall.Kill(-1, syscall.SIGCONT)
	if !waitProcesses("/proc", grace) {
		_ = syscall.Kill(-1, syscall.SIGKILL)
		waitProcesses("/proc", time.Second)
	}
	unix.Sync()
	if b, err := os.ReadFile("/proc/self/mounts"); err == nil {
		for _, dir := range diskMounts(string(b)) {
			if err := unix.Unmount(dir, 0); err != nil {
				log.printf("warning: umount %s: %v", dir, err)
				_ = unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
			}
		}
	}
	log.printf("end action=%s reason=%q uptime=%.6f", act, reason, uptime())
	_ = unix.IoctlSetInt(1, unix.TCSBRK, 1) // drain: the last line must get out
	if err := rebootInto(act); err != nil {
		log.printf("%v", err)
	}
}

// waitProcesses waits until no user process but process 1 is left.
func waitProcesses(proc string, limit time.Duration) bool {
	deadline := time.Now().Add(limit)
	for userProcesses(proc) > 0 {
		if time.Now().After(deadline) {
			return false
		}
		time.Sleep(5 * time.Millisecond)
	}
	return true
}

// userProcesses counts processes other than 1 that have a command line; kernel
// threads and zombies have none.
func userProcesses(proc string) int {
	entries, err := os.ReadDir(proc)
	if err != nil {
		return 0
	}
	n := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == 1 {
			continue
		}
		if b, err := os.ReadFile(filepath.Join(proc, e.Name(), "cmdline")); err == nil && len(b) > 0 {
			n++
		}
	}
	return n
}

// diskMounts lists the mount points of block devices, the deepest first.
func diskMounts(mounts string) []string {
	var dirs []string
	sc := bufio.NewScanner(strings.NewReader(mounts))
	for sc.Scan() {
		f := strings.Fields(sc.Text())
		if len(f) < 2 || !strings.HasPrefix(f[0], "/dev/") {
			continue
		}
		if dir := unescapeMount(f[1]); dir != "/" {
			dirs = append([]string{dir}, dirs...)
		}
	}
	return dirs
}

// urootBoot is u-root's command that finds a system on a disk and starts it by
// kexec.
const urootBoot = "/bbin/boot"

// bootCommand is what the name boot does: unmount the disks that this program
// mounted, then u-root's boot. The disks would else be busy for it, and be left
// as after a power cut.
func bootCommand(args []string) int {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		fmt.Fprintln(os.Stderr, "boot:", err)
	}
	for _, dir := range diskMounts(string(b)) {
		if !strings.HasPrefix(dir, mountRoot+"/") {
			continue
		}
		if err := unix.Unmount(dir, 0); err != nil {
			fmt.Fprintf(os.Stderr, "boot: umount %s: %v\n", dir, err)
		}
	}
	err = unix.Exec(urootBoot, append([]string{"boot"}, args...), os.Environ())
	fmt.Fprintf(os.Stderr, "boot: exec %s: %v\n", urootBoot, err)
	return 127
}

// unescapeMount undoes the octal escapes of /proc/mounts (man 5 fstab).
func unescapeMount(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
