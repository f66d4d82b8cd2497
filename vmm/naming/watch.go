package naming

import (
	"ditto.vm/images/layer"
	"ditto.vm/memory/names"
)

// watchedFile is a layer that nobody should write, and what its file system said
// of it when it was added.
type watchedFile struct {
	layer names.LayerID
	path  string
	file  *layer.File
	stamp layer.Stamp
	bad   bool
}

// watchFile remembers the state of an immutable layer. One whose state cannot be
// read names nothing.
func (n *Naming) watchFile(id names.LayerID, path string) {
	file, err := layer.OpenFile(path)
	if err != nil {
		n.distrust(id, path, err.Error())
		return
	}
	stamp, err := file.Stamp()
	if err != nil {
		n.distrust(id, path, err.Error())
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.watched = append(n.watched, &watchedFile{layer: id, path: path, file: file, stamp: stamp, bad: err != nil})
}

// checkFiles drops the names of immutable layers that changed. A proof is about
// the bytes of its day.
func (n *Naming) checkFiles() {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.watched {
		if w.bad {
			continue
		}
		now, err := w.file.Stamp()
		why := w.stamp.Difference(now)
		if err != nil {
			why = err.Error()
		}
		if why != "" {
			w.bad = true
			n.distrust(w.layer, w.path, why)
		}
	}
}

// distrust takes a layer out of use, and says so.
func (n *Naming) distrust(id names.LayerID, path, why string) {
	n.table.DropBeyond(id, 0)
	n.log.Warn("memory is not named after this file any more; restart the machine to do so again", "image", path, "err", why)
}
