package memory

import "fmt"

// The 32-bit hole: RAM ends at HoleStart at the latest and continues at
// HoleEnd. PCI windows, ECAM and the APICs live inside.
const (
	HoleStart GPA = 3 << 30
	HoleEnd   GPA = 4 << 30
)

// Sizes of guest RAM that a layout accepts, in bytes.
const (
	MinSize = 1 << 20
	MaxSize = 1 << 40
)

// Range is a run of guest-physical addresses.
type Range struct {
	Start GPA
	Size  uint64 // bytes
}

// End returns the first address after the range.
func (r Range) End() GPA { return r.Start + GPA(r.Size) }

// Contains reports whether [gpa, gpa+n) lies inside the range.
func (r Range) Contains(gpa GPA, n uint64) bool {
	return gpa >= r.Start && n <= r.Size && uint64(gpa-r.Start) <= r.Size-n
}

// Layout returns the RAM ranges of a guest with size bytes: everything below
// the hole first, what is left from 4 GiB up. The size must be a multiple of a
// page between [MinSize] and [MaxSize].
func Layout(size uint64) ([]Range, error) {
	switch {
	case size%PageSize != 0:
		return nil, fmt.Errorf("memory size %d is not a multiple of %d bytes", size, PageSize)
	case size < MinSize:
		return nil, fmt.Errorf("memory size %d is below the minimum of %d bytes", size, MinSize)
	case size > MaxSize:
		return nil, fmt.Errorf("memory size %d is above the maximum of %d bytes", size, uint64(MaxSize))
	}
	if size <= uint64(HoleStart) {
		return []Range{{Start: 0, Size: size}}, nil
	}
	return []Range{
		{Start: 0, Size: uint64(HoleStart)},
		{Start: HoleEnd, Size: size - uint64(HoleStart)},
	}, nil
}
