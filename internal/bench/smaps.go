package bench

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// footprint is resident memory in bytes: the guest's, and what is not.
type footprint struct {
	guest               uint64
	anonymous, resident uint64 // outside the guest's
}

// errNoGuestMemory says that no mapping has the size of the guest's memory.
var errNoGuestMemory = errors.New("no mapping is as large as the guest's memory")

// readSmaps sums proc_pid_smaps(5) over every mapping. The guest's memory is the
// one of exactly guestBytes.
func readSmaps(r io.Reader, guestBytes uint64) (footprint, error) {
	var sum footprint
	var inGuest, found bool
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		key, rest, _ := strings.Cut(lines.Text(), " ")
		if !strings.HasSuffix(key, ":") {
			size, err := mappingSize(key)
			if err != nil {
				return footprint{}, err
			}
			inGuest = size == guestBytes
			found = found || inGuest
			continue
		}
		if key != "Rss:" && key != "Anonymous:" {
			continue
		}
		kib, err := strconv.ParseUint(strings.TrimSpace(strings.TrimSuffix(rest, "kB")), 10, 64)
		if err != nil {
			return footprint{}, fmt.Errorf("smaps line %q: %w", lines.Text(), err)
		}
		switch {
		case inGuest && key == "Rss:":
			sum.guest += kib << 10
		case inGuest:
		case key == "Rss:":
			sum.resident += kib << 10
		default:
			sum.anonymous += kib << 10
		}
	}
	if err := lines.Err(); err != nil {
		return footprint{}, err
	}
	if !found {
		return footprint{}, errNoGuestMemory
	}
	return sum, nil
}

// mappingSize is the length of an address range START-END, in hexadecimal.
func mappingSize(addresses string) (uint64, error) {
	low, high, _ := strings.Cut(addresses, "-")
	start, err1 := strconv.ParseUint(low, 16, 64)
	end, err2 := strconv.ParseUint(high, 16, 64)
	if err := errors.Join(err1, err2); err != nil || end < start {
		return 0, fmt.Errorf("smaps: %q is not an address range", addresses)
	}
	return end - start, nil
}
