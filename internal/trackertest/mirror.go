package trackertest

import (
	"bytes"
	"fmt"

	"ditto.vm/memory"
)

// Mirror is a copy of a Space that follows it through a tracker.
type Mirror struct {
	space   *memory.Space
	tracker memory.Tracker
	copies  [][]byte // one a region
	set     *memory.PageSet
}

// NewMirror arms all of the Space and copies it. Writers may run meanwhile.
func NewMirror(space *memory.Space, tracker memory.Tracker) (*Mirror, error) {
	m := &Mirror{space: space, tracker: tracker, set: space.NewPageSet()}
	for _, r := range space.Regions() {
		if err := tracker.Arm(r.Range); err != nil {
			return nil, fmt.Errorf("arm the region at %s: %w", r.Start, err)
		}
		c := make([]byte, r.Size)
		if err := space.ReadAt(c, r.Start); err != nil {
			return nil, err
		}
		m.copies = append(m.copies, c)
	}
	return m, nil
}

// Round collects what was written since the last round, copies it, and returns
// the pages, valid until the next call.
func (m *Mirror) Round(mode memory.CollectMode) (*memory.PageSet, error) {
	m.set.Clear()
	for _, r := range m.space.Regions() {
		if err := m.tracker.Collect(r.Range, m.set, mode); err != nil {
			return nil, err
		}
	}
	for run := range m.set.Runs() {
		dst, err := m.at(run)
		if err != nil {
			return nil, err
		}
		if err := m.space.ReadAt(dst, run.Start); err != nil {
			return nil, err
		}
	}
	return m.set, nil
}

// Check compares all of the Space with the copy and names the first page that
// differs: one that was written and never reported. No writer may run.
func (m *Mirror) Check() error {
	for _, r := range m.space.Regions() {
		now, err := m.space.View(r.Start, r.Size)
		if err != nil {
			return err
		}
		was, err := m.at(r.Range)
		if err != nil {
			return err
		}
		if bytes.Equal(now, was) {
			continue
		}
		for off := 0; off < len(now); off += memory.PageSize {
			if !bytes.Equal(now[off:off+memory.PageSize], was[off:off+memory.PageSize]) {
				return fmt.Errorf("page %s was written and %s did not report it", r.Start+memory.GPA(off), m.tracker.Kind())
			}
		}
	}
	return nil
}

// at returns the copy of r, which lies in one region.
func (m *Mirror) at(r memory.Range) ([]byte, error) {
	for i, region := range m.space.Regions() {
		if region.Contains(r.Start, r.Size) {
			off := uint64(r.Start - region.Start)
			return m.copies[i][off : off+r.Size], nil
		}
	}
	return nil, fmt.Errorf("[%s, +%#x): %w", r.Start, r.Size, memory.ErrOutOfRange)
}
