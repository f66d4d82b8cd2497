package namestest_test

import (
	"bytes"
	"context"
	"fmt"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// verdict is what a comparison of names with bytes found.
type verdict struct {
	proven, hints, passed int      // names that are right: proven, provisional, of a pass
	wrong                 []string // those that are not
}

func (v *verdict) add(o verdict) {
	v.proven, v.hints, v.passed = v.proven+o.proven, v.hints+o.hints, v.passed+o.passed
	v.wrong = append(v.wrong, o.wrong...)
}

// compare holds every name of the data pages to its bytes: those of the table,
// and those of a pass over all of memory. The rig is settled. A name that is not
// proven may be wrong where a vCPU stored into the page, which nobody has looked
// for yet; stored says where. No other name may be.
func (r *rig) compare(stored func(memory.GPA) bool) (v verdict) {
	r.t.Helper()
	image := r.image()
	table := r.naming.Table()
	for gpa := memory.GPA(dataStart); gpa < memorySize; gpa += page {
		switch name := table.At(gpa.GFN()); {
		case name.Kind() == names.None, !name.Proven() && stored(gpa):
		case !r.equal(gpa, name, image):
			v.wrong = append(v.wrong, fmt.Sprintf("page %s is not %s (proven %t)", gpa, name, name.Proven()))
		case name.Proven():
			v.proven++
		default:
			v.hints++
		}
	}
	all, err := (&names.Pass{Space: r.space, Table: table, Layers: table.Layers()}).Run(context.Background())
	check(r.t, err)
	if !all.Exact() {
		r.t.Error("a pass over a paused guest is not exact")
	}
	for gpa := memory.GPA(0); gpa < memorySize; gpa += page {
		switch name := all.At(gpa.GFN()); {
		case name.Kind() == names.None:
		case !r.equal(gpa, name, image):
			v.wrong = append(v.wrong, fmt.Sprintf("page %s is not %s, as a pass says", gpa, name))
		case name.Kind() == names.Block:
			v.passed++
		}
	}
	return v
}

// equal reports whether the page holds what its name says.
func (r *rig) equal(gpa memory.GPA, name names.Name, image []byte) bool {
	r.t.Helper()
	b, err := r.space.View(gpa, page)
	check(r.t, err)
	switch name.Kind() {
	case names.Zero:
		return bytes.Equal(b, make([]byte, page))
	case names.Block:
		off := int(name.Number()) * names.BlockSize
		return off+names.BlockSize <= len(image) && bytes.Equal(b, image[off:off+names.BlockSize])
	case names.Page:
		other, err := r.space.View(memory.GFN(name.Number()).GPA(), page)
		check(r.t, err)
		return bytes.Equal(b, other)
	}
	return false
}
