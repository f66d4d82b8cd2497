package snapshot

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// Capture is what memory is at the moment of the snapshot.
type Capture struct {
	// Map names pages. Nil stores everything that is populated; after AddMap it
	// is nil.
	Map *names.Map
	// Dirty are pages that may have been written since the map was made and
	// since they were given to AddPages last: of the rest, the map's names are
	// true and what is stored is right. Nil means that this is not known: the map
	// must be exact, and what was stored is compared again.
	Dirty *memory.PageSet
	// SinceParent are the pages that may have been written since the parent was
	// captured: the rest is not looked at. Nil means that this is not known, and
	// that pages are compared with the parent by digest.
	SinceParent *memory.PageSet
}

// captured is what Commit needs of a capture.
type captured struct {
	Capture
	// need are the pages that were looked at in the end.
	need *memory.PageSet
	// instead[p] stands for page p, which equalled others and was written since.
	instead map[memory.GFN]memory.GFN
}

// Capture stores what is not stored yet, or keeps a copy of it. The VM is paused
// and its devices are drained until it returns; then the VM may go on, with the
// declared layers frozen for good.
func (w *Writer) Capture(ctx context.Context, c Capture) error {
	if w.err != nil {
		return w.err
	}
	if err := w.doCapture(ctx, c); err != nil {
		return w.fail("capture memory", err)
	}
	return nil
}

func (w *Writer) doCapture(ctx context.Context, c Capture) error {
	switch {
	case w.capture != nil:
		return errors.New("memory was captured already")
	case w.live != nil:
		return w.captureLive(ctx, c)
	case c.Map != nil && !c.Map.Exact() && c.Dirty == nil:
		return errors.New("the map was made while the guest ran, and nothing says what was written since")
	case c.Map != nil && !slices.Equal(c.Map.Regions(), w.regions):
		return errors.New("the map is of another memory")
	case c.SinceParent != nil && w.o.Parent == nil:
		return errors.New("there is no parent to compare with")
	}
	k := &captured{Capture: c, need: w.o.Space.NewPageSet(), instead: make(map[memory.GFN]memory.GFN)}
	if err := w.choose(k); err != nil {
		return err
	}
	if err := w.store(ctx, k.need, runtime.NumCPU(), w.o.Space.View); err != nil {
		return err
	}
	w.capture = k
	return nil
}

// choose fills in which pages must be looked at.
func (w *Writer) choose(k *captured) error {
	if k.Map == nil {
		for _, r := range w.regions {
			if err := w.o.Space.Populated(r, func(r memory.Range) { k.need.Add(r.Start, r.Size) }); err != nil {
				return err
			}
		}
		if k.Dirty == nil {
			// What was stored may have been given back to the host since.
			for r := range w.stored.Runs() {
				k.need.Add(r.Start, r.Size)
			}
		}
		w.forget(k, k.need)
	} else if err := w.chooseByMap(k); err != nil {
		return err
	}
	if k.Dirty != nil {
		for r := range k.Dirty.Runs() {
			k.need.Add(r.Start, r.Size)
		}
	}
	return nil
}

func (w *Writer) chooseByMap(k *captured) error {
	unnamed := w.o.Space.NewPageSet()
	for r := range k.Map.Runs() {
		gpa, size := r.Start.GPA(), r.Pages*memory.PageSize
		named, err := w.named(r)
		switch {
		case err != nil:
			return err
		case !named:
			unnamed.Add(gpa, size)
		case r.Name.Kind() == names.Page:
			w.chooseEqual(k, r, unnamed)
		}
	}
	w.forget(k, unnamed)
	for r := range unnamed.Runs() {
		k.need.Add(r.Start, r.Size)
	}
	return nil
}

// named reports whether the snapshot can use the names of a run.
func (w *Writer) named(r names.Run) (bool, error) {
	switch r.Name.Kind() {
	case names.Zero, names.Page:
		return true, nil
	case names.Block:
		i, ok := w.byNames[r.Name.Layer()]
		if ok && w.o.Layers[i].Written {
			return false, fmt.Errorf("layer %s: %w: freeze it under an overlay first", w.o.Layers[i].Path, ErrLayerWritten)
		}
		return ok && w.inLayer(i, r.Name.Number(), r.Pages), nil
	case names.Parent:
		if w.o.Parent == nil {
			return false, errors.New("the map names pages of a parent, and there is none")
		}
		return true, nil
	}
	return false, nil
}

// inLayer reports whether blocks lie inside a layer.
func (w *Writer) inLayer(i int, block, n uint64) bool {
	blocks := uint64(w.o.Layers[i].Size) / memory.PageSize
	return block < blocks && n <= blocks-block
}

// chooseEqual takes of pages that equal others those whose other was written
// since: the first of them stands for it from now on.
func (w *Writer) chooseEqual(k *captured, r names.Run, unnamed *memory.PageSet) {
	target := memory.GFN(r.Name.Number())
	if k.Dirty == nil || k.Dirty.CountIn(target.GPA(), r.Pages*memory.PageSize) == 0 {
		return
	}
	for i := range memory.GFN(r.Pages) {
		if !k.Dirty.Has((target + i).GPA()) || k.Dirty.Has((r.Start + i).GPA()) {
			continue
		}
		if _, ok := k.instead[target+i]; !ok {
			k.instead[target+i] = r.Start + i
			unnamed.Add((r.Start + i).GPA(), memory.PageSize)
		}
	}
}

// forget takes out of a set what need not be looked at: what is stored and was
// not written since, and what the parent holds and was not written since.
func (w *Writer) forget(k *captured, set *memory.PageSet) {
	if k.Dirty != nil {
		for r := range w.stored.Runs() {
			if k.Dirty.CountIn(r.Start, r.Size) == 0 {
				set.Remove(r.Start, r.Size)
				continue
			}
			for gpa := r.Start; gpa < r.End(); gpa += memory.PageSize {
				if !k.Dirty.Has(gpa) {
					set.Remove(gpa, memory.PageSize)
				}
			}
		}
	}
	if k.SinceParent == nil {
		return
	}
	for r := range set.Runs() {
		for gpa := r.Start; gpa < r.End(); gpa += memory.PageSize {
			if !k.SinceParent.Has(gpa) {
				set.Remove(gpa, memory.PageSize)
				w.parent.Add(gpa, memory.PageSize)
			}
		}
	}
}

// name returns what a page is, as a run of one, once everything is stored. The
// map names it so.
func (w *Writer) name(gfn memory.GFN, by names.Name) (Run, error) {
	k := w.capture
	r := Run{Start: gfn, Pages: 1}
	if !k.need.Has(gfn.GPA()) {
		switch by.Kind() {
		case names.Zero:
			r.Kind = Zero
			return r, nil
		case names.Block:
			if i, ok := w.byNames[by.Layer()]; ok && w.inLayer(i, by.Number(), 1) {
				r.Kind, r.Layer, r.Number = Block, i, by.Number()
				return r, nil
			}
		case names.Parent:
			r.Kind = FromParent
			return r, nil
		case names.Page:
			if other := memory.GFN(by.Number()); k.instead[other] != gfn {
				return w.equal(gfn, other)
			}
		}
	}
	return w.state(gfn)
}

// state returns what a page is that was looked at.
func (w *Writer) state(gfn memory.GFN) (Run, error) {
	r := Run{Start: gfn, Pages: 1}
	slot := w.slot[w.index(gfn)]
	switch {
	case w.zero.Has(gfn.GPA()):
		r.Kind = Zero
	case w.parent.Has(gfn.GPA()):
		r.Kind = FromParent
	case slot != 0:
		r.Kind, r.Number = Unique, uint64(slot-1)
	case w.capture.Map == nil:
		r.Kind = Zero // not populated
	default:
		return Run{}, fmt.Errorf("page %s has neither a name nor bytes", gfn)
	}
	return r, nil
}

// equal returns what a page is that equals another.
func (w *Writer) equal(gfn, other memory.GFN) (r Run, err error) {
	if in, ok := w.capture.instead[other]; ok {
		other = in
		r, err = w.state(other)
	} else if by := w.capture.Map.At(other); by.Kind() != names.Page && w.o.Space.Contains(other.GPA(), memory.PageSize) {
		r, err = w.name(other, by)
	} else {
		err = fmt.Errorf("page %s equals page %s, which does not stand for itself", gfn, other)
	}
	if r.Kind == Unique || r.Kind == FromParent {
		r.Kind, r.Number = Page, uint64(other)
	}
	r.Start = gfn
	return r, err
}

// runs returns what memory is.
func (w *Writer) runs(ctx context.Context) ([]Run, error) {
	l := runList{regions: w.regions}
	add := func(r names.Run) error {
		k := w.capture
		if kind := r.Name.Kind(); kind == names.Zero && k.need.CountIn(r.Start.GPA(), r.Pages*memory.PageSize) == 0 {
			l.add(Run{Start: r.Start, Pages: r.Pages, Kind: Zero})
			return nil
		}
		counts := r.Name.Kind() == names.Block || r.Name.Kind() == names.Page
		for i := range r.Pages {
			by := r.Name
			if counts {
				by += names.Name(i)
			}
			page, err := w.name(r.Start+memory.GFN(i), by)
			if err != nil {
				return err
			}
			l.add(page)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return nil
	}
	if w.capture.Map == nil {
		for _, r := range w.regions {
			if err := add(names.Run{Start: r.Start.GFN(), Pages: r.Size / memory.PageSize}); err != nil {
				return nil, err
			}
		}
		return l.runs, nil
	}
	for r := range w.capture.Map.Runs() {
		if err := add(r); err != nil {
			return nil, err
		}
	}
	return l.runs, nil
}
