package names

import "ditto.vm/memory"

// SetImmutable says whether nobody writes a layer from now on. The names of its
// blocks stay; nothing of it is in flight.
func (t *Table) SetImmutable(l LayerID, immutable bool) {
	if layer := t.layer(l); layer != nil {
		layer.immutable.Store(immutable)
	}
}

// Follow adds to a set, over the whole Space, every page whose name dies from
// now on: before its block or the page itself changes by I/O, and when a written
// page is collected. Who has seen a proven name afterwards, and finds the page
// neither in the set nor reported by the tracker, knows that the name is true
// still. One at a time follows; nil ends it.
func (t *Table) Follow(lost *memory.PageSet) { t.lost.Store(lost) }

// lose notes that the name of a page has died.
func (t *Table) lose(page uint32) {
	if lost := t.lost.Load(); lost != nil {
		lost.Add(t.gpa(page), memory.PageSize)
	}
}
