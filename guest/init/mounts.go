package main

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// baseMount is a file system every guest needs. An optional one may be missing
// from the kernel without a word.
type baseMount struct {
	source, dir, fsType string
	flags               uintptr
	data                string
	optional            bool
}

func baseMounts() []baseMount {
	const nox = unix.MS_NOSUID | unix.MS_NOEXEC | unix.MS_NODEV
	return []baseMount{
		{"proc", "/proc", "proc", nox, "", false},
		{"sysfs", "/sys", "sysfs", nox, "", false},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=0755", false},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666", false},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", true},
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=0755", true},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777", true},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", nox, "", true},
	}
}

// mountBase mounts them all and reports what a guest will miss.
func mountBase(mounts []baseMount) []error {
	var errs []error
	for _, m := range mounts {
		if err := os.MkdirAll(m.dir, 0o755); err != nil && !m.optional {
			errs = append(errs, err)
			continue
		}
		err := unix.Mount(m.source, m.dir, m.fsType, m.flags, m.data)
		// EBUSY: the kernel mounted /dev itself (CONFIG_DEVTMPFS_MOUNT).
		if err != nil && !m.optional && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("mount %s on %s: %w", m.fsType, m.dir, err))
		}
	}
	return errs
}

// linkStdStreams makes /dev/fd and its kin, which shells and scripts expect.
func linkStdStreams() {
	for name, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0",
		"/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2",
	} {
		_ = os.Symlink(target, name)
	}
}
