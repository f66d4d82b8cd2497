package memmap

import (
	"errors"
	"fmt"
	"math"
	"math/bits"
	"strconv"
)

// Sizes of what is drawn, in bytes.
const (
	PageSize       = 4096
	LargeFrameSize = 2 << 20
)

// Kind is what sort of thing the pages of a class equal. The values are those
// of the control API.
type Kind string

// The kinds.
const (
	NotPopulated Kind = "not_populated"
	Zero         Kind = "zero"
	Layer        Kind = "layer"
	OtherLayers  Kind = "other_layers"
	Parent       Kind = "parent"
	Duplicate    Kind = "duplicate"
	Unique       Kind = "unique"
	Unknown      Kind = "unknown"
)

// Region is a range of guest RAM.
type Region struct{ Start, Bytes uint64 }

// Class is a set of pages drawn in one colour.
type Class struct {
	Kind  Kind
	Title string // of a layer
	Bytes uint64
}

// maxClasses is how many classes have colours.
const maxClasses = 16

// State is how a large frame is mapped.
type State uint8

// The states.
const (
	Empty State = iota
	Small
	Large
)

// Frame is a state in bits 7 and 6 and reasons to be small below.
type Frame byte

// State returns how the frame is mapped.
func (f Frame) State() State { return State(f >> 6) }

// reasons describes the bits below the state.
var reasons = [...]string{"shared with equal pages", "mapped from a file", "the balloon holds pages", "written while tracked", "partly populated"}

// Map is what is drawn.
type Map struct {
	Name    string // of the machine
	Notes   []string
	Regions []Region // in ascending order
	// CellBytes is PageSize, and Pages has an index of Classes for each page;
	// or it is a power of two from LargeFrameSize on, and Counts has, for each
	// cell and class, the number of pages.
	CellBytes uint64
	Classes   []Class
	Pages     []byte
	Counts    []uint16
	// Frames has an entry for each whole large frame, region after region, or
	// none if it is not known how they are mapped.
	Frames []Frame
}

// cells returns how many cells a region has; the last may be cut off.
func (m *Map) cells(r Region) int { return int((r.Bytes + m.CellBytes - 1) / m.CellBytes) }

// Bytes returns the size of RAM.
func (m *Map) Bytes() uint64 {
	n := uint64(0)
	for _, r := range m.Regions {
		n += r.Bytes
	}
	return n
}

// Bounds of what is drawn. They keep a picture to some megapixels, and damaged
// data from being drawn at all.
const (
	maxBytes   = 1 << 40
	maxPages   = 1 << 20
	maxCells   = 1 << 16
	maxRegions = 16
)

// Check returns why the map cannot be drawn, or nil.
func (m *Map) Check() error {
	if err := m.checkRegions(); err != nil {
		return err
	}
	if len(m.Classes) == 0 || len(m.Classes) > maxClasses {
		return fmt.Errorf("%d classes: 1 to %d can be drawn", len(m.Classes), maxClasses)
	}
	cells, frames := 0, 0
	for _, r := range m.Regions {
		cells += m.cells(r)
		frames += int(r.Bytes / LargeFrameSize)
	}
	if len(m.Frames) != frames && len(m.Frames) != 0 {
		return fmt.Errorf("%d frames are described, RAM has %d", len(m.Frames), frames)
	}
	if m.CellBytes > PageSize {
		if cells > maxCells || len(m.Counts) != cells*len(m.Classes) {
			return fmt.Errorf("%d counts do not fit %d cells of %d classes", len(m.Counts), cells, len(m.Classes))
		}
		return nil
	}
	if cells > maxPages || len(m.Pages) != cells {
		return fmt.Errorf("%d pages are described, RAM has %d, and at most %d are drawn one by one", len(m.Pages), cells, maxPages)
	}
	for i, c := range m.Pages {
		if int(c) >= len(m.Classes) {
			return fmt.Errorf("page %d is of class %d, there are %d", i, c, len(m.Classes))
		}
	}
	return nil
}

func (m *Map) checkRegions() error {
	if c := m.CellBytes; bits.OnesCount64(c) != 1 || c != PageSize && c < LargeFrameSize || c > maxBytes {
		return fmt.Errorf("cells of %d bytes: a page, or a power of two from 2 MiB on, can be drawn", c)
	}
	end := uint64(0)
	for _, r := range m.Regions {
		switch {
		case r.Start < end || r.Start%LargeFrameSize != 0 || r.Start%m.CellBytes != 0 || r.Bytes%PageSize != 0 || r.Bytes == 0:
			return fmt.Errorf("RAM at %#x of %#x bytes is out of order or not aligned", r.Start, r.Bytes)
		case r.Start > 2*maxBytes || r.Bytes > maxBytes:
			return fmt.Errorf("RAM at %#x of %#x bytes is too large", r.Start, r.Bytes)
		}
		end = r.Start + r.Bytes
	}
	if len(m.Regions) == 0 || len(m.Regions) > maxRegions || m.Bytes() > maxBytes {
		return errors.New("no RAM, or too much, to draw")
	}
	return nil
}

// frameCounts counts frames by state, and small ones by reason; the last counts
// those without.
func (m *Map) frameCounts() (states [3]int, why [len(reasons) + 1]int) {
	for _, f := range m.Frames {
		s := min(f.State(), Large)
		states[s]++
		if s != Small {
			continue
		}
		found := false
		for i := range reasons {
			if f&(1<<i) != 0 {
				why[i]++
				found = true
			}
		}
		if !found {
			why[len(reasons)]++
		}
	}
	return states, why
}

// size prints bytes for people, with at most one digit behind the point.
func size(n uint64) string {
	value, unit := scaled(n)
	if value == math.Trunc(value) {
		return fmt.Sprintf("%.0f %s", value, unit)
	}
	return fmt.Sprintf("%.1f %s", value, unit)
}

// exactSize prints the distance from an address that is not rounded.
func exactSize(n uint64) string {
	if n == 0 {
		return "0"
	}
	value, unit := scaled(n)
	return strconv.FormatFloat(value, 'f', -1, 64) + " " + unit
}

// scaled divides bytes by the largest unit that fits.
func scaled(n uint64) (value float64, unit string) {
	units := [...]string{"B", "KiB", "MiB", "GiB", "TiB"}
	i := 0
	for value = float64(n); value >= 1024 && i < len(units)-1; i++ {
		value /= 1024
	}
	return value, units[i]
}
