package memory

import (
	"fmt"
	"strings"
)

// HugePages selects which host page size backs guest memory.
type HugePages int

// The host page sizes. The zero value is transparent huge pages, the default.
const (
	// HugePagesTHP asks for transparent huge pages with MADV_HUGEPAGE.
	HugePagesTHP HugePages = iota
	// HugePagesOff forbids transparent huge pages with MADV_NOHUGEPAGE.
	HugePagesOff
	// HugePages2M takes 2 MiB pages from the hugetlbfs pool.
	HugePages2M
	// HugePages1G takes 1 GiB pages from the hugetlbfs pool.
	HugePages1G
)

var hugePagesNames = [...]string{"thp", "off", "2M", "1G"}

// String returns the flag value: thp, off, 2M or 1G.
func (h HugePages) String() string {
	if h < 0 || int(h) >= len(hugePagesNames) {
		return fmt.Sprintf("HugePages(%d)", int(h))
	}
	return hugePagesNames[h]
}

// MarshalText implements encoding.TextMarshaler.
func (h HugePages) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (h *HugePages) UnmarshalText(text []byte) error {
	for i, name := range hugePagesNames {
		if strings.EqualFold(string(text), name) {
			*h = HugePages(i)
			return nil
		}
	}
	return fmt.Errorf("unknown huge page size %q: use thp, 2M, 1G or off", text)
}

// frameSize is the alignment that GPA and HVA must share, and for hugetlbfs
// the size that a region must be a multiple of.
func (h HugePages) frameSize() uint64 {
	if h == HugePages1G {
		return HugeFrameSize
	}
	return LargeFrameSize
}

// Backing selects the kind of host memory.
type Backing int

// The kinds of host memory. The zero value is anonymous, the default.
const (
	// Anonymous is private anonymous memory: KSM, sharing by remapping and
	// transparent huge pages all work on it.
	Anonymous Backing = iota
	// Memfd is shared memory that another process can map by descriptor.
	Memfd
)

var backingNames = [...]string{"anonymous", "memfd"}

// String returns the flag value: anonymous or memfd.
func (b Backing) String() string {
	if b < 0 || int(b) >= len(backingNames) {
		return fmt.Sprintf("Backing(%d)", int(b))
	}
	return backingNames[b]
}

// MarshalText implements encoding.TextMarshaler.
func (b Backing) MarshalText() ([]byte, error) { return []byte(b.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (b *Backing) UnmarshalText(text []byte) error {
	for i, name := range backingNames {
		if strings.EqualFold(string(text), name) {
			*b = Backing(i)
			return nil
		}
	}
	return fmt.Errorf("unknown memory backing %q: use anonymous or memfd", text)
}
