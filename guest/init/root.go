package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	newRoot      = "/newroot"
	rootDiskWait = 5 * time.Second
)

// sourceless file systems are mounted by a tag or an export, not from a block
// device with a superblock.
func sourceless(fsType string) bool {
	return slices.Contains([]string{"virtiofs", "9p", "nfs", "nfs4"}, fsType)
}

// mountNewRoot mounts the root file system the kernel command line names.
func mountNewRoot(spec rootSpec) error {
	if sourceless(spec.fsType) {
		if err := os.MkdirAll(newRoot, 0o755); err != nil {
			return err
		}
		var flags uintptr
		if spec.readOnly {
			flags = unix.MS_RDONLY
		}
		if err := unix.Mount(spec.source, newRoot, spec.fsType, flags, spec.flags); err != nil {
			return fmt.Errorf("root=%s (%s): %w", spec.source, spec.fsType, err)
		}
		return nil
	}
	d, err := waitDisk(spec.source, rootDiskWait)
	if err != nil {
		return err
	}
	if spec.fsType != "" {
		d.fsType = spec.fsType
	}
	return mountDisk(d, newRoot, spec.readOnly, spec.flags)
}

// switchRoot moves the base mounts into the mounted new root, frees the
// initramfs, makes the new root / and becomes its init. It returns only on
// failure. What could be wrong with the disk is found before anything is moved.
func switchRoot(spec rootSpec) error {
	initPath := filepath.Join(newRoot, spec.init)
	if fi, err := os.Lstat(initPath); err != nil || fi.IsDir() {
		return fmt.Errorf("the root file system has no %s", spec.init)
	}
	_ = unix.Unmount("/tmp", unix.MNT_DETACH)
	for _, dir := range []string{"/dev", "/proc", "/sys", "/run"} {
		target := filepath.Join(newRoot, dir)
		if _, err := os.Stat(target); err != nil {
			continue
		}
		if err := unix.Mount(dir, target, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	var st unix.Stat_t
	if err := unix.Lstat("/", &st); err == nil {
		freeInitramfs("/", st.Dev)
	}
	if err := unix.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	if err := unix.Chdir("/"); err != nil {
		return err
	}
	return os.NewSyscallError("exec "+spec.init, unix.Exec(spec.init, []string{spec.init}, kernelEnv()))
}

// kernelEnv is the environment the kernel gave, without what only a shell here
// would want.
func kernelEnv() []string {
	var env []string
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, "ditto.") {
			env = append(env, e)
		}
	}
	return env
}

// freeInitramfs deletes the files of the device dev below dir. It never
// crosses into a mount, so the new root is safe.
func freeInitramfs(dir string, dev uint64) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		p := filepath.Join(dir, e.Name())
		var st unix.Stat_t
		if unix.Lstat(p, &st) != nil || st.Dev != dev {
			continue
		}
		if e.IsDir() {
			freeInitramfs(p, dev)
		}
		_ = os.Remove(p)
	}
}
