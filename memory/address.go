package memory

import "fmt"

// GPA is a guest-physical address.
type GPA uint64

// GFN is a guest frame number: a GPA shifted right by [PageShift].
type GFN uint64

// HVA is a host-virtual address in the VMM's process.
type HVA uintptr

// Sizes of what the CPU and KVM map, in bytes.
const (
	PageShift = 12
	// PageSize is the unit of naming, tracking and transfer.
	PageSize = 1 << PageShift
	// LargeFrameSize is what one PMD-level EPT/NPT entry maps.
	LargeFrameSize = 2 << 20
	// HugeFrameSize is what one PUD-level EPT/NPT entry maps.
	HugeFrameSize = 1 << 30
)

// GFN returns the frame that holds a.
func (a GPA) GFN() GFN { return GFN(a >> PageShift) }

// String prints the address in hexadecimal.
func (a GPA) String() string { return fmt.Sprintf("%#x", uint64(a)) }

// GPA returns the address of the first byte of the frame.
func (f GFN) GPA() GPA { return GPA(f) << PageShift }

// String prints the frame number in hexadecimal.
func (f GFN) String() string { return fmt.Sprintf("%#x", uint64(f)) }

// String prints the address in hexadecimal.
func (a HVA) String() string { return fmt.Sprintf("%#x", uintptr(a)) }
