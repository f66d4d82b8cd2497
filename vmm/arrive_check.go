package vmm

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/migration/state"
	"ditto.vm/vmm/config"
)

// checkOffer refuses a VM that cfg does not make, or that has no room here, and
// returns its CPUs without their registers.
func checkOffer(o live.Offer, cfg *config.Config) (*cpuSection, error) {
	offered, err := config.Parse(o.Config)
	if err != nil {
		return nil, fmt.Errorf("the offered VM: %w", err)
	}
	// Its own description of itself, held against what is made here.
	if err := checkMachine(machineMessage(&offered, o.RAM, o.Ditto), cfg); err != nil {
		return nil, err
	}
	var x state.CPU
	if o.CPU.Name != "cpu" {
		return nil, fmt.Errorf("the offered VM: a section %q where its CPU should be", o.CPU.Name)
	}
	if err := state.Decode(o.CPU, &x); err != nil {
		return nil, fmt.Errorf("the offered VM: %w", err)
	}
	cpus, err := decodeCPUID(&x)
	if err != nil {
		return nil, &state.Error{Section: "cpu", Err: err}
	}
	return cpus, roomForArrival(&cfg.Memory, o)
}

// roomFor reports that this host has less memory than a VM may use. The host's
// /proc and /sys are below root.
func roomFor(m *config.Memory, root string) error {
	if m.HugePages == memory.HugePages2M || m.HugePages == memory.HugePages1G {
		return nil // taken from a pool as soon as it is mapped
	}
	return checkRoom(root, uint64(m.Size), "the VM has")
}

// checkRoom reports that so many bytes cannot be had on this host.
func checkRoom(root string, bytes uint64, what string) error {
	room, err := availableMemory(root)
	if err != nil {
		return nil //nolint:nilerr // a host that does not say has room
	}
	if bytes > room {
		return fmt.Errorf("%w: %s %d MiB, and %d MiB are available here: end something, or add swap", ErrNoMemory, what, bytes>>20, room>>20)
	}
	return nil
}

// availableMemory is how many bytes may be used without harm: what is free or
// cached, swap, and no more than the process's group may have.
func availableMemory(root string) (uint64, error) {
	f, err := os.Open(filepath.Join(root, "proc/meminfo"))
	if err != nil {
		return 0, err
	}
	defer f.Close()
	room, found := uint64(0), false
	for lines := bufio.NewScanner(f); lines.Scan(); {
		name, value, _ := strings.Cut(lines.Text(), ":")
		if name != "MemAvailable" && name != "SwapFree" {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		if err != nil {
			return 0, err
		}
		room, found = room+kib<<10, true
	}
	if !found {
		return 0, errors.New("no MemAvailable")
	}
	return min(room, groupMemory(root)), nil
}

// groupMemory is how much the process's control group may use more, as far as one
// of version 2 limits it.
func groupMemory(root string) uint64 {
	const unlimited = ^uint64(0)
	text, err := os.ReadFile(filepath.Join(root, "proc/self/cgroup"))
	if err != nil {
		return unlimited
	}
	room := unlimited
	_, path, _ := strings.Cut(strings.TrimSpace(string(text)), "0::")
	path, _, _ = strings.Cut(path, "\n")
	for dir := filepath.Clean("/" + path); ; dir = filepath.Dir(dir) {
		at := filepath.Join(root, "sys/fs/cgroup", dir)
		limit, errLimit := readNumber(filepath.Join(at, "memory.max"))
		used, errUsed := readNumber(filepath.Join(at, "memory.current"))
		if errLimit == nil && errUsed == nil {
			room = min(room, limit-min(used, limit))
		}
		if dir == "/" {
			return room
		}
	}
}

// readNumber reads a file that holds a number, or another word and then fails.
func readNumber(path string) (uint64, error) {
	text, err := os.ReadFile(path)
	if err != nil {
		return 0, err
	}
	return strconv.ParseUint(strings.TrimSpace(string(text)), 10, 64)
}

// sameLayer reports whether a layer that is here can be the one that was offered.
func sameLayer(l live.Layer, format string, size int64) bool {
	return l.Format == format && l.Size == size
}

// bootFile reports whether a path is what the VM boots, and no other file of this
// host.
func bootFile(cfg *config.Config, path string) bool {
	for _, known := range []string{cfg.Kernel, cfg.Initrd} {
		if known == "" || strings.HasPrefix(known, PayloadPrefix) {
			continue
		}
		if at, err := filepath.Abs(known); err == nil && slices.Contains([]string{at, known}, path) {
			return true
		}
	}
	return false
}
