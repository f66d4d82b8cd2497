package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"ditto.vm/internal/lab/wire"
)

// maxFiles is the hard limit on open files that commands inherit.
const maxFiles = 1 << 20

// settle does what can be done once the root is in place, and last what needs
// the modules that modulesLoaded waits for. Nothing here is fatal.
func (s *setup) settle(modulesLoaded func()) {
	s.note(unix.Sethostname([]byte(s.cfg.Hostname)))
	s.note(unix.Setrlimit(unix.RLIMIT_NOFILE, &unix.Rlimit{Cur: 1024, Max: maxFiles}))
	s.note(loopbackUp())
	s.note(set("/sys/kernel/mm/transparent_hugepage/enabled", s.cfg.THP))
	s.note(set("/sys/fs/cgroup/cgroup.subtree_control", "+cpu +io +memory +pids"))
	s.note(set("/proc/sys/net/ipv4/ping_group_range", "0 2147483647"))
	s.note(bindModules(s.cfg.ModulesRoot))
	s.note(staticNodes())
	for link, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2",
	} {
		if err := os.Symlink(target, filepath.Join("/dev", link)); !os.IsExist(err) {
			s.note(err)
		}
	}
	modulesLoaded()
	s.note(s.openDevices())
	s.note(keepVM())
	s.note(s.disks())
}

func set(path, value string) error {
	if value == "" {
		return nil
	}
	return os.WriteFile(path, []byte(value), 0)
}

func loopbackUp() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("loopback: %w", err)
	}
	return netlink.LinkSetUp(lo)
}

// bindModules lets modprobe find the modules of the running kernel.
func bindModules(dir string) error {
	if dir == "" {
		return nil
	}
	const target = "/lib/modules"
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dir, target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s: %w", target, err)
	}
	return nil
}

// staticNodes makes the device nodes whose opening loads a module, as
// kmod static-nodes does ("tun net/tun c10:200" in modules.devname).
func staticNodes() error {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join("/lib/modules", unix.ByteSliceToString(uts.Release[:]), "modules.devname"))
	if err != nil {
		return err
	}
	for line := range strings.Lines(string(text)) {
		var module, name string
		var kind byte
		var major, minor uint32
		if _, err := fmt.Sscanf(line, "%s %s %c%d:%d", &module, &name, &kind, &major, &minor); err != nil || kind != 'c' {
			continue // a comment, or a block device that appears with its module
		}
		path := filepath.Join("/dev", name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		err := unix.Mknod(path, unix.S_IFCHR|0o600, int(unix.Mkdev(major, minor)))
		if err != nil && !errors.Is(err, unix.EEXIST) {
			return fmt.Errorf("make %s: %w", path, err)
		}
	}
	return nil
}

// openDevices gives devices the rights that udev would give them.
func (s *setup) openDevices() error {
	if s.cfg.KVMGroup >= 0 {
		if err := os.Chown("/dev/kvm", 0, s.cfg.KVMGroup); err != nil {
			return err
		}
		if err := os.Chmod("/dev/kvm", 0o660); err != nil {
			return err
		}
	}
	return os.Chmod("/dev/net/tun", 0o666)
}

// disks mounts the scratch disk and links the caller's disks. They are told
// apart by the serial numbers that the host gave them.
func (s *setup) disks() error {
	if err := os.MkdirAll(wire.DiskDir, 0o755); err != nil {
		return err
	}
	serials, err := filepath.Glob("/sys/block/*/serial")
	if err != nil {
		return err
	}
	for _, path := range serials {
		b, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		dev := filepath.Join("/dev", filepath.Base(filepath.Dir(path)))
		serial := string(bytes.TrimSpace(b))
		switch {
		case serial == wire.ScratchSerial:
			m := mountStep{dev, wire.ScratchDir, "ext4", 0, ""}
			if err := m.mount(); err != nil {
				return err
			}
			if err := os.Chmod(wire.ScratchDir, 0o1777); err != nil {
				return err
			}
		case strings.HasPrefix(serial, wire.DiskSerial):
			if err := os.Symlink(dev, filepath.Join(wire.DiskDir, serial)); err != nil {
				return err
			}
		}
	}
	return nil
}
