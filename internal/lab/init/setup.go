package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// setup builds the machine's file tree and settings, once.
type setup struct {
	cfg wire.Config

	mu     sync.Mutex
	errors []string // what failed without being fatal
}

// mountStep is one mount of the table below.
type mountStep struct {
	source, target, fstype string
	flags                  uintptr
	data                   string
}

const (
	hostRoot = "/host"    // the host's root, read-only
	overlay  = "/overlay" // tmpfs with what is written over it
	newRoot  = "/newroot" // both together
)

const opts9p = "trans=virtio,version=9p2000.L,msize=524288"

// early is what the modules and the root need.
var early = []mountStep{
	{"proc", "/proc", "proc", 0, ""},
	{"sysfs", "/sys", "sysfs", 0, ""},
	{"devtmpfs", "/dev", "devtmpfs", 0, ""},
}

// root is the file tree. The host's files do not change under the lab as far as
// cache=loose is concerned; what does change goes through the share.
var root = []mountStep{
	{wire.HostTag, hostRoot, "9p", unix.MS_RDONLY, opts9p + ",cache=loose"},
	{"tmpfs", overlay, "tmpfs", 0, "mode=755,size=75%"},
	{"overlay", newRoot, "overlay", 0,
		"lowerdir=" + hostRoot + ",upperdir=" + overlay + "/upper,workdir=" + overlay + "/work"},
}

// late is mounted in the new root. A failure is reported, not fatal.
var late = []mountStep{
	{"proc", "/proc", "proc", 0, ""},
	{"sysfs", "/sys", "sysfs", 0, ""},
	{"devtmpfs", "/dev", "devtmpfs", 0, ""},
	{"devpts", "/dev/pts", "devpts", 0, "mode=620,ptmxmode=666,gid=5"},
	{"tmpfs", "/dev/shm", "tmpfs", 0, "mode=1777"},
	{"tmpfs", "/run", "tmpfs", 0, "mode=755"},
	{"cgroup2", "/sys/fs/cgroup", "cgroup2", 0, ""},
	{"debugfs", "/sys/kernel/debug", "debugfs", 0, ""},
	{wire.ShareTag, wire.ShareDir, "9p", 0, opts9p + ",cache=none"},
}

// run does it all. The error is fatal: there is no root to run anything in.
func (s *setup) run() error {
	for _, m := range early {
		if err := m.mount(); err != nil {
			return err
		}
	}
	var err error
	if s.cfg, err = readConfig(); err != nil {
		return err
	}
	groups, err := openModules()
	if err != nil {
		return err
	}
	if len(groups) == 0 {
		return errors.New("the initramfs holds no modules")
	}
	if err := groups[0].load(); err != nil {
		return err
	}
	wait := s.loadBeside(groups[1:])
	if err := mountRoot(); err != nil {
		return err
	}
	for _, m := range late {
		s.note(m.mount())
	}
	s.settle(wait)
	return nil
}

// mountRoot makes the file tree and moves into it.
func mountRoot() error {
	for _, m := range root {
		if err := m.mount(); err != nil {
			return err
		}
		if m.target != overlay {
			continue
		}
		for _, dir := range []string{"upper", "work"} {
			if err := os.Mkdir(filepath.Join(overlay, dir), 0o755); err != nil {
				return err
			}
		}
	}
	return moveIn()
}

// mount makes the target and mounts on it.
func (m mountStep) mount() error {
	if err := os.MkdirAll(m.target, 0o755); err != nil {
		return fmt.Errorf("mount %s: %w", m.target, err)
	}
	if err := unix.Mount(m.source, m.target, m.fstype, m.flags, m.data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", m.source, m.target, err)
	}
	return nil
}

// moveIn makes newRoot the root of this process and, because they share it, of
// the kernel's own helpers (modprobe). pivot_root does not work on an initramfs
// (Documentation/filesystems/ramfs-rootfs-initramfs.rst).
func moveIn() error {
	if err := os.Chdir(newRoot); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return os.Chdir("/")
}

// note records a failure that is not fatal.
func (s *setup) note(err error) {
	if err != nil {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.errors = append(s.errors, err.Error())
	}
}
