package main

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// mountRoot is where disks appear: /mnt/vda, and /mnt/LABEL as a link to it.
const mountRoot = "/mnt"

// disk is a block device (a whole disk or a partition) with a file system.
type disk struct {
	name string // vda, vda1
	superblock
}

// diskNames lists the block devices of /sys/class/block that hold data of a
// guest: whole disks and partitions of virtio, SCSI, NVMe, MMC and pmem.
func diskNames(sysfs string) []string {
	entries, err := os.ReadDir(filepath.Join(sysfs, "class/block"))
	if err != nil {
		return nil
	}
	var names []string
	for _, e := range entries {
		for _, prefix := range []string{"vd", "sd", "nvme", "mmcblk", "pmem"} {
			if strings.HasPrefix(e.Name(), prefix) {
				names = append(names, e.Name())
				break
			}
		}
	}
	return names
}

// findDisks reads the superblock of every block device.
func findDisks(sysfs, dev string) (found []disk, errs []error) {
	for _, name := range diskNames(sysfs) {
		f, err := os.Open(filepath.Join(dev, name))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		sb, err := readSuperblock(f)
		f.Close()
		if err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", name, err))
			continue
		}
		if sb.fsType != "" {
			found = append(found, disk{name, sb})
		}
	}
	return found, errs
}

// lookupDisk finds the disk that a source names: a path under /dev, a bare
// name, LABEL=... or UUID=....
func lookupDisk(disks []disk, source string) (disk, bool) {
	for _, d := range disks {
		switch {
		case strings.HasPrefix(source, "LABEL="):
			if d.label != "" && d.label == source[len("LABEL="):] {
				return d, true
			}
		case strings.HasPrefix(source, "UUID="):
			if d.uuid != "" && strings.EqualFold(d.uuid, source[len("UUID="):]) {
				return d, true
			}
		case strings.TrimPrefix(source, "/dev/") == d.name:
			return d, true
		}
	}
	return disk{}, false
}

// mountDisk mounts read-write when the device and the file system allow it.
func mountDisk(d disk, dir string, readOnly bool, data string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	dev := filepath.Join("/dev", d.name)
	if !readOnly {
		err := unix.Mount(dev, dir, d.fsType, unix.MS_RELATIME, data)
		if err == nil {
			return nil
		}
		if !errors.Is(err, unix.EACCES) && !errors.Is(err, unix.EROFS) {
			return fmt.Errorf("mount %s (%s) on %s: %w", dev, d.fsType, dir, err)
		}
	}
	err := unix.Mount(dev, dir, d.fsType, unix.MS_RDONLY, data)
	if errors.Is(err, unix.EROFS) && data == "" && (d.fsType == "ext4" || d.fsType == "ext3") {
		// A journal that cannot be replayed, because the device is read-only.
		err = unix.Mount(dev, dir, d.fsType, unix.MS_RDONLY, "noload")
	}
	if err != nil {
		return fmt.Errorf("mount %s (%s) read-only on %s: %w", dev, d.fsType, dir, err)
	}
	return nil
}

// mountDisks mounts what the configuration names and, unless it says no, every
// other file system under /mnt. It returns how many it mounted.
func mountDisks(c config) (mounted int, errs []error) {
	if !c.mountAuto && len(c.mounts) == 0 {
		return 0, nil
	}
	disks, errs := findDisks("/sys", "/dev")
	taken := map[string]bool{}
	for _, m := range c.mounts {
		d, ok := lookupDisk(disks, m.source)
		if !ok {
			errs = append(errs, fmt.Errorf("ditto.mount: no disk %s with a file system", m.source))
			continue
		}
		taken[d.name] = true
		if err := mountDisk(d, m.dir, m.readOnly, ""); err != nil {
			errs = append(errs, err)
			continue
		}
		mounted++
	}
	if !c.mountAuto {
		return mounted, errs
	}
	for _, d := range disks {
		if taken[d.name] {
			continue
		}
		if err := mountDisk(d, filepath.Join(mountRoot, d.name), false, ""); err != nil {
			errs = append(errs, err)
			continue
		}
		mounted++
		if safeLabel(d.label) {
			_ = os.Symlink(d.name, filepath.Join(mountRoot, d.label))
		}
	}
	return mounted, errs
}

// safeLabel tells whether a label, which anyone may have written, can be the
// name of a link.
func safeLabel(label string) bool {
	if label == "" || label[0] == '.' {
		return false
	}
	for _, r := range label {
		ok := r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '-' || r == '_' || r == '.'
		if !ok {
			return false
		}
	}
	return true
}

// waitDisk looks for a disk until it appears or the time is over: drivers
// probe asynchronously.
func waitDisk(source string, limit time.Duration) (disk, error) {
	deadline := time.Now().Add(limit)
	for {
		disks, _ := findDisks("/sys", "/dev")
		if d, ok := lookupDisk(disks, source); ok {
			return d, nil
		}
		if time.Now().After(deadline) {
			return disk{}, fmt.Errorf("root=%s: no such disk with a file system; disks: %s",
				source, strings.Join(diskNames("/sys"), " "))
		}
		time.Sleep(20 * time.Millisecond)
	}
}
