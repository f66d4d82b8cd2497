package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"slices"

	"golang.org/x/sys/unix"

	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// A live save stores memory while the guest writes it. Its order is
//
//	arm all of memory
//	make the map                       AddMap   stores what has no name
//	collect and re-arm the written     AddPages stores them, again and again
//	pause, collect                     Capture  stores the last of them
//
// Why the snapshot then holds memory as it was in the pause: a page that no
// collection reported was not written since it was armed, which was before the
// map looked at it and before it was stored. One that was reported is stale:
// the map is not asked about it any more, and its bytes were read after the
// collection that reported it last had armed it again, or else that was the
// last of all, in the pause.
//
// Two things besides writes make a name of the map false. The block changes: who
// makes the map knows of that and adds the page as if it were written. And a
// page equals another that is written: of those that equal it the first that is
// not stale stands in for it from then on, and is stored.

// liveMap is a map that was made while the guest ran.
type liveMap struct {
	m *names.Map
	// stale are the pages about which the map is not asked: they were looked at
	// since, and are stored as they are.
	stale *memory.PageSet
	// equals are the pages that equal others by the map, ascending by the other:
	// its number in the upper half, theirs in the lower.
	equals []uint64
	// instead[p] stands in for page p, which is stale and which others equal.
	instead map[memory.GFN]memory.GFN
}

// AddMap stores early what a map leaves without a name. The map was made while
// the guest ran, and all of memory was armed before. What it says of a page
// holds, unless the page is in doubt, until it is given to AddPages or is in
// [Capture.Dirty]. From then on Capture wants no map.
func (w *Writer) AddMap(ctx context.Context, m *names.Map, doubt *memory.PageSet) error {
	if w.err != nil {
		return w.err
	}
	if err := w.addMap(ctx, m, doubt); err != nil {
		return w.fail("store memory", err)
	}
	return nil
}

func (w *Writer) addMap(ctx context.Context, m *names.Map, doubt *memory.PageSet) error {
	switch {
	case w.live != nil:
		return errors.New("there is a map already")
	case !slices.Equal(m.Regions(), w.regions):
		return errors.New("the map is of another memory")
	}
	l := &liveMap{m: m, stale: w.o.Space.NewPageSet(), instead: make(map[memory.GFN]memory.GFN)}
	unnamed := w.o.Space.NewPageSet()
	for r := range m.Runs() {
		if err := w.addRun(l, r, unnamed); err != nil {
			return err
		}
	}
	slices.Sort(l.equals)
	w.live = l
	if doubt != nil {
		for r := range w.renew(doubt).Runs() {
			unnamed.Add(r.Start, r.Size)
		}
	}
	return w.store(ctx, unnamed, w.o.Workers, w.o.Space.View)
}

// addRun notes which pages of a run equal others, or must be stored.
func (w *Writer) addRun(l *liveMap, r names.Run, unnamed *memory.PageSet) error {
	named, err := w.named(r)
	switch {
	case err != nil:
		return err
	case !named:
		unnamed.Add(r.Start.GPA(), r.Pages*memory.PageSize)
	case r.Name.Kind() == names.Page:
		for i := range r.Pages {
			l.equals = append(l.equals, (r.Name.Number()+i)<<32|uint64(r.Start)+i)
		}
	}
	return nil
}

// outdate says that the map is not to be asked about pages any more. It returns
// which pages stand in now for pages that others equal: they must be stored too.
func (l *liveMap) outdate(pages *memory.PageSet) []memory.GFN {
	for r := range pages.Runs() {
		l.stale.Add(r.Start, r.Size)
	}
	var standIns []memory.GFN
	seen := make(map[memory.GFN]bool)
	look := func(target memory.GFN) {
		if seen[target] || !l.stale.Has(target.GPA()) {
			return
		}
		seen[target] = true
		in, ok := l.standIn(target)
		switch {
		case !ok:
			delete(l.instead, target)
		case l.instead[target] != in:
			l.instead[target] = in
			standIns = append(standIns, in)
		}
	}
	for r := range pages.Runs() {
		for gfn := r.Start.GFN(); gfn < r.End().GFN(); gfn++ {
			look(gfn)
			if n := l.m.At(gfn); n.Kind() == names.Page {
				look(memory.GFN(n.Number()))
			}
		}
	}
	return standIns
}

// standIn returns the first page that equals another by the map and is not
// stale.
func (l *liveMap) standIn(target memory.GFN) (memory.GFN, bool) {
	i, _ := slices.BinarySearch(l.equals, uint64(target)<<32)
	for ; i < len(l.equals) && l.equals[i]>>32 == uint64(target); i++ {
		if gfn := memory.GFN(uint32(l.equals[i])); !l.stale.Has(gfn.GPA()) {
			return gfn, true
		}
	}
	return 0, false
}

// renew returns the pages to be stored when some were written.
func (w *Writer) renew(written *memory.PageSet) *memory.PageSet {
	if w.live == nil {
		return written
	}
	all := w.o.Space.NewPageSet()
	for r := range written.Runs() {
		all.Add(r.Start, r.Size)
	}
	for _, gfn := range w.live.outdate(written) {
		all.Add(gfn.GPA(), memory.PageSize)
	}
	return all
}

// mostHeld bounds the copy of what Capture is to store: 64 MiB.
const mostHeld = 64 << 20

// Prepare makes room for a copy of so many pages, within bounds. With it Capture
// copies instead of storing, and Commit stores when the VM runs again. Call it
// right before the pause.
func (w *Writer) Prepare(pages uint64) {
	w.room = make([]byte, min(pages*memory.PageSize, mostHeld))
	for i := 0; i < len(w.room); i += memory.PageSize {
		w.room[i] = 1 // the pause is no time for page faults
	}
}

// Sync makes durable what is stored so far, so that less is left for Commit, and
// nothing holds up writing in the pause.
func (w *Writer) Sync() error {
	if w.err != nil {
		return w.err
	}
	if err := w.pages.Sync(); err != nil {
		return w.fail("store memory", err)
	}
	return nil
}

// held is a copy of pages.
type held struct {
	pages *memory.PageSet
	runs  []heldRun
}

type heldRun struct {
	memory.Range
	bytes []byte
}

// captureLive is Capture after AddMap.
func (w *Writer) captureLive(ctx context.Context, c Capture) error {
	switch {
	case c.Map != nil || c.SinceParent != nil:
		return errors.New("a map was added already")
	case c.Dirty == nil:
		return errors.New("nothing says what was written since the map was made")
	}
	need := w.renew(c.Dirty)
	w.capture = &captured{Capture: c, need: w.live.stale, instead: w.live.instead}
	w.capture.Map = w.live.m
	if need.Count()*memory.PageSize <= uint64(len(w.room)) {
		return w.hold(ctx, need)
	}
	return w.store(ctx, need, runtime.NumCPU(), w.o.Space.View)
}

// hold copies pages for Commit to store.
func (w *Writer) hold(ctx context.Context, pages *memory.PageSet) error {
	h := &held{pages: pages}
	room := w.room
	for r := range pages.Runs() {
		h.runs = append(h.runs, heldRun{r, room[:r.Size:r.Size]})
		room = room[r.Size:]
	}
	w.held = h
	rows := batches(pages) // pieces that all cores can share
	return parallel.Do(ctx, runtime.NumCPU(), len(rows), func(_ context.Context, _, i int) error {
		for _, r := range rows[i] {
			src, err := w.o.Space.View(r.Start, r.Size)
			if err != nil {
				return err
			}
			dst, err := h.view(r.Start, r.Size)
			if err != nil {
				return err
			}
			copy(dst, src)
		}
		return nil
	})
}

// view returns the copy of pages that lie in one run.
func (h *held) view(gpa memory.GPA, n uint64) ([]byte, error) {
	i, ok := slices.BinarySearchFunc(h.runs, gpa, func(r heldRun, gpa memory.GPA) int {
		switch {
		case r.End() <= gpa:
			return -1
		case r.Start > gpa:
			return 1
		}
		return 0
	})
	if !ok || n > uint64(h.runs[i].End()-gpa) {
		return nil, fmt.Errorf("no copy of %d bytes at %s", n, gpa)
	}
	return h.runs[i].bytes[gpa-h.runs[i].Start:][:n], nil
}

// storeHeld stores what Capture copied.
func (w *Writer) storeHeld(ctx context.Context) error {
	defer func() { w.held, w.room = nil, nil }()
	if w.held == nil {
		return nil
	}
	return w.store(ctx, w.held.pages, w.o.Workers, w.held.view)
}

// onDisk is what an open file takes of the disk, in bytes.
func onDisk(fd uintptr) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(fd), &st); err != nil {
		return 0, &fs.PathError{Op: "stat", Path: PagesName, Err: err}
	}
	return uint64(st.Blocks) * 512, nil
}
