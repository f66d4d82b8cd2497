package memory

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"strconv"
)

// HostUsage is what the host's page tables say of guest memory, in bytes
// (Documentation/filesystems/proc.rst, smaps).
type HostUsage struct {
	RSS           uint64 // resident
	PSS           uint64 // resident, shared pages divided by their users
	AnonHugePages uint64 // mapped by huge pages of private memory
	ShmemPMD      uint64 // mapped by huge pages of a memfd
	KSM           uint64 // merged with equal pages
	Swap          uint64 // swapped out
	VMAs          int    // mappings that hold guest memory
}

// smapsFields are the lines of smaps that HostUsage takes.
var smapsFields = map[string]func(*HostUsage) *uint64{
	"Rss":            func(u *HostUsage) *uint64 { return &u.RSS },
	"Pss":            func(u *HostUsage) *uint64 { return &u.PSS },
	"AnonHugePages":  func(u *HostUsage) *uint64 { return &u.AnonHugePages },
	"ShmemPmdMapped": func(u *HostUsage) *uint64 { return &u.ShmemPMD },
	"KSM":            func(u *HostUsage) *uint64 { return &u.KSM },
	"Swap":           func(u *HostUsage) *uint64 { return &u.Swap },
}

// HostUsage reads /proc/self/smaps. It walks every page table of the process:
// for looking, not for a loop.
func (s *Space) HostUsage() (HostUsage, error) {
	f, err := os.Open("/proc/self/smaps")
	if err != nil {
		return HostUsage{}, fmt.Errorf("host memory usage: %w", err)
	}
	defer f.Close()
	usage, err := parseSmaps(f, func(start, end uint64) bool {
		for i := range s.regions {
			r := &s.regions[i]
			if start < uint64(r.HVA)+r.Size && uint64(r.HVA) < end {
				return true
			}
		}
		return false
	})
	if err != nil {
		return HostUsage{}, fmt.Errorf("host memory usage: %w", err)
	}
	return usage, nil
}

// parseSmaps sums up the mappings that wanted picks by their addresses.
func parseSmaps(r io.Reader, wanted func(start, end uint64) bool) (HostUsage, error) {
	var usage HostUsage
	in := false
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		name, rest, ok := bytes.Cut(lines.Bytes(), []byte{':'})
		if start, end, isHeader := parseRange(lines.Bytes()); isHeader {
			if in = wanted(start, end); in {
				usage.VMAs++
			}
			continue
		}
		field := smapsFields[string(name)]
		if !in || !ok || field == nil {
			continue
		}
		kb, err := strconv.ParseUint(string(bytes.TrimSuffix(bytes.TrimSpace(rest), []byte(" kB"))), 10, 54)
		if err != nil {
			return HostUsage{}, fmt.Errorf("line %q: %w", lines.Text(), err)
		}
		*field(&usage) += kb << 10
	}
	return usage, lines.Err()
}

// parseRange reads the addresses that start the first line of a mapping:
// "7f0000000000-7f0000200000 rw-p ...".
func parseRange(line []byte) (start, end uint64, ok bool) {
	addresses, _, found := bytes.Cut(line, []byte{' '})
	from, to, dash := bytes.Cut(addresses, []byte{'-'})
	if !found || !dash {
		return 0, 0, false
	}
	start, err1 := strconv.ParseUint(string(from), 16, 64)
	end, err2 := strconv.ParseUint(string(to), 16, 64)
	return start, end, err1 == nil && err2 == nil
}
