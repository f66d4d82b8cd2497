package vmm

import (
	"bufio"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
)

// ProcessMemory is the resident memory of the VM's process, in bytes.
type ProcessMemory struct {
	GuestRAM  uint64 // resident part of guest RAM
	GuestHuge uint64 // of that, in huge pages
	// GuestPSS is the resident part with what is shared divided among the
	// processes that share it.
	GuestPSS uint64
	// GuestCopied is what was written of guest RAM that is mapped from files.
	GuestCopied uint64
	Anonymous   uint64 // anonymous memory besides guest RAM: the VMM's own
	Other       uint64 // file-backed and shared memory besides guest RAM
}

// processMemory sums /proc/self/smaps, telling guest RAM from the rest by
// address.
func (m *VM) processMemory() (ProcessMemory, error) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return ProcessMemory{}, err
	}
	defer f.Close()
	return parseSmaps(f, func(start uint64) bool {
		for _, r := range m.mem.Regions() {
			if lo := uint64(r.HVA); start >= lo && start < lo+r.Size {
				return true
			}
		}
		return false
	})
}

// parseSmaps reads the format of proc_pid_smaps(5). isGuest tells whether a
// mapping that starts at an address is guest RAM.
func parseSmaps(r io.Reader, isGuest func(start uint64) bool) (ProcessMemory, error) {
	var p ProcessMemory
	var rss uint64
	guest, file := false, false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		line := lines.Text()
		key, rest, _ := strings.Cut(line, " ")
		if !strings.HasSuffix(key, ":") {
			// A header: START-END PERMS OFFSET DEV INODE PATH.
			low, _, _ := strings.Cut(key, "-")
			start, err := strconv.ParseUint(low, 16, 64)
			if err != nil {
				return ProcessMemory{}, fmt.Errorf("smaps line %q: %w", line, err)
			}
			guest, file = isGuest(start), mapsFile(rest)
			continue
		}
		var value *uint64
		var scratch uint64
		switch key {
		case "Rss:":
			value = &rss
		case "Pss:", "Anonymous:", "AnonHugePages:", "ShmemPmdMapped:", "Private_Hugetlb:", "Shared_Hugetlb:":
			value = &scratch
		default:
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
		if err != nil {
			return ProcessMemory{}, fmt.Errorf("smaps line %q: %w", line, err)
		}
		*value = kib << 10
		switch {
		case key == "Rss:" && guest:
			p.GuestRAM += rss
		case key == "Rss:":
			p.Other += rss
		case key == "Pss:" && guest:
			p.GuestPSS += scratch
		case key == "Pss:":
		case key == "Anonymous:" && guest && file:
			p.GuestCopied += scratch
		case key == "Anonymous:" && !guest:
			p.Anonymous += scratch
			p.Other -= min(scratch, p.Other)
		case strings.HasSuffix(key, "_Hugetlb:") && guest:
			// hugetlbfs memory is not part of Rss.
			p.GuestRAM += scratch
			p.GuestPSS += scratch
			p.GuestHuge += scratch
		case key != "Anonymous:" && guest:
			p.GuestHuge += scratch
		}
	}
	return p, lines.Err()
}

// mapsFile tells whether the header of a mapping, behind its addresses, is a
// file's: PERMS OFFSET DEV INODE PATH.
func mapsFile(header string) bool {
	fields := strings.Fields(header)
	return len(fields) > 3 && fields[3] != "0"
}
