package boot

import (
	"cmp"
	"fmt"
	"slices"

	"ditto.vm/memory"
)

// E820Type classifies a range of the memory map (ACPI 6.5, 15.1).
type E820Type uint32

// The types that ditto uses.
const (
	E820RAM      E820Type = 1
	E820Reserved E820Type = 2
)

// E820Entry is one range of the memory map.
type E820Entry struct {
	memory.Range
	Type E820Type
}

// maxE820 is what the zero page holds (E820_MAX_ENTRIES_ZEROPAGE).
const maxE820 = 128

// memoryMap returns the sorted map of ram with the reserved ranges, and the
// firmware area below 1 MiB, cut out of it.
func memoryMap(ram, reserved []memory.Range) ([]E820Entry, error) {
	holes := append([]memory.Range{{Start: lowReserved, Size: uint64(lowEnd - lowReserved)}}, reserved...)
	holes, err := mergeRanges(holes)
	if err != nil {
		return nil, err
	}
	var entries []E820Entry
	for _, r := range ram {
		for _, left := range subtract(r, holes) {
			entries = append(entries, E820Entry{left, E820RAM})
		}
	}
	for _, r := range holes {
		entries = append(entries, E820Entry{r, E820Reserved})
	}
	slices.SortFunc(entries, func(a, b E820Entry) int { return cmp.Compare(a.Start, b.Start) })
	if len(entries) > maxE820 {
		return nil, fmt.Errorf("memory map has %d ranges, more than the %d of the boot protocol", len(entries), maxE820)
	}
	return entries, nil
}

// mergeRanges sorts ranges and joins those that touch or overlap.
func mergeRanges(ranges []memory.Range) ([]memory.Range, error) {
	sorted := slices.Clone(ranges)
	slices.SortFunc(sorted, func(a, b memory.Range) int { return cmp.Compare(a.Start, b.Start) })
	var merged []memory.Range
	for _, r := range sorted {
		if r.Size == 0 || r.End() < r.Start {
			return nil, fmt.Errorf("reserved range [%s, +%#x) is empty or wraps", r.Start, r.Size)
		}
		if n := len(merged); n > 0 && r.Start <= merged[n-1].End() {
			last := &merged[n-1]
			last.Size = uint64(max(last.End(), r.End()) - last.Start)
			continue
		}
		merged = append(merged, r)
	}
	return merged, nil
}

// subtract returns what is left of r without the sorted, disjoint holes.
func subtract(r memory.Range, holes []memory.Range) []memory.Range {
	var left []memory.Range
	start := r.Start
	for _, h := range holes {
		if h.End() <= start || h.Start >= r.End() {
			continue
		}
		if h.Start > start {
			left = append(left, memory.Range{Start: start, Size: uint64(h.Start - start)})
		}
		start = h.End()
	}
	if start < r.End() {
		left = append(left, memory.Range{Start: start, Size: uint64(r.End() - start)})
	}
	return left
}
