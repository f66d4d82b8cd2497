package naming

import (
	"errors"
	"fmt"
	"io"
	"path/filepath"

	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/memory/names"
)

// source is one layer: an image of a disk's chain, or a file that was loaded. It
// reads the same at the same offsets whatever is stacked on it.
type source struct {
	id     names.LayerID
	disk   *chain.Layer // nil for a file
	path   string       // absolute
	size   int64        // of a file, in bytes
	format string
	// identity is by content when that is known, and otherwise drawn for as long
	// as the machine lives.
	identity layer.ID
	index    *guardedIndex // of a layer that was immutable from the start
	watch    *watchedFile  // nil while the layer is written
	retired  bool          // nothing may be named by it any more
}

// stamp reads the stamp of a layer as it is now.
func (s *source) stamp() (layer.Stamp, error) {
	if s.disk == nil {
		return s.watch.file.Stamp()
	}
	stamp, err := s.disk.Stamp()
	stamp.Size = sizeOf(s.disk)
	return stamp, err
}

// length is the size of a layer in bytes.
func (s *source) length() int64 {
	if s.disk == nil {
		return s.size
	}
	return sizeOf(s.disk)
}

// sizeOf is the size of a layer in bytes. The zeros that fill the last sector of
// a raw one do not count: the file does not hold them.
func sizeOf(l *chain.Layer) int64 {
	if l.Format() == chain.Raw {
		return l.File().Size()
	}
	return l.Size()
}

// AddDisk makes a disk known, with all layers of its chain, and returns what its
// device tells of its I/O. Indexes beside the images are opened if they are the
// images'; a bad one is announced and not used.
func (n *Naming) AddDisk(c *chain.Chain) (*DiskObserver, error) {
	layers := c.Layers()
	o := &DiskObserver{naming: n, table: n.table, chain: c}
	// The lowest first: what several disks share is found first.
	for i := len(layers) - 1; i >= 0; i-- {
		s, err := n.addLayer(layers[i], n.openIndex(layers[i]), i > 0 || c.ReadOnly())
		if err != nil {
			return nil, fmt.Errorf("name memory by disk %s: %w", c.Path(), err)
		}
		o.layer = s.id
	}
	return o, nil
}

// addLayer makes an image known, with its index, which may be nil.
func (n *Naming) addLayer(l *chain.Layer, index *guardedIndex, immutable bool) (*source, error) {
	s := &source{disk: l, format: string(l.Format()), identity: layer.NewWritten()}
	added := names.Layer{Title: l.Path(), Size: sizeOf(l), Immutable: immutable, Source: l}
	if index != nil {
		added.Index = index
	}
	var err error
	if s.path, err = filepath.Abs(l.Path()); err == nil {
		s.id, err = n.table.AddLayer(added)
	}
	if err != nil {
		if index != nil {
			err = errors.Join(err, index.Close())
		}
		return nil, err
	}
	if index != nil {
		index.layer = s.id
		if immutable {
			s.index, s.identity = index, index.index.LayerID()
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	if index != nil {
		n.indexes = append(n.indexes, index)
	}
	n.sources = append(n.sources, s)
	if immutable {
		n.watch(s, nil)
	}
	return s, nil
}

// addFile makes a file known that is loaded into memory.
func (n *Naming) addFile(path string, size int64, r io.ReaderAt) (names.LayerID, error) {
	s := &source{size: size, format: string(chain.Raw), identity: layer.NewWritten()}
	var err error
	if s.path, err = filepath.Abs(path); err != nil {
		return 0, err
	}
	if s.id, err = n.table.AddLayer(names.Layer{Title: path, Size: size, Immutable: true, Source: r}); err != nil {
		return 0, err
	}
	file, err := layer.OpenFile(path)
	n.mu.Lock()
	defer n.mu.Unlock()
	n.sources = append(n.sources, s)
	if err != nil {
		s.watch = &watchedFile{bad: true}
		n.distrust(s, err.Error())
	} else {
		n.watch(s, file)
	}
	return s.id, nil
}

// find returns a layer by its number. Preconditions: mu is held.
func (n *Naming) find(id names.LayerID) *source {
	for _, s := range n.sources {
		if s.id == id {
			return s
		}
	}
	return nil
}

// of returns an image. Preconditions: mu is held.
func (n *Naming) of(l *chain.Layer) *source {
	for _, s := range n.sources {
		if s.disk == l {
			return s
		}
	}
	return nil
}

// ImageLayer returns the number of an image in the table.
func (n *Naming) ImageLayer(l *chain.Layer) (id names.LayerID, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.of(l); s != nil {
		return s.id, true
	}
	return 0, false
}

// FileLayer returns the number of a file that was loaded, by its absolute path.
func (n *Naming) FileLayer(path string) (id names.LayerID, ok bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, s := range n.sources {
		if s.disk == nil && s.path == path {
			return s.id, true
		}
	}
	return 0, false
}

// Identify gives a layer the identity that it had when an earlier machine used it,
// unless its index says which one it has by content.
func (n *Naming) Identify(id names.LayerID, identity layer.ID) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if s := n.find(id); s != nil && s.index == nil && identity.Kind() != layer.Unknown {
		s.identity = identity
	}
}

// Room reports whether so many layers more can be named.
func (n *Naming) Room(layers int) bool { return len(n.table.Layers())+layers <= names.MaxLayers }

// Frozen says that the disk's top is not written any more. Nothing of it is in
// flight.
func (d *DiskObserver) Frozen() {
	n := d.naming
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.find(d.layer)
	// An index of what it was is no proof of what it is.
	n.table.DropIndex(s.id)
	n.table.SetImmutable(s.id, true)
	n.watch(s, nil)
}

// Thawed says that it is written again.
func (d *DiskObserver) Thawed() {
	n := d.naming
	n.mu.Lock()
	defer n.mu.Unlock()
	s := n.find(d.layer)
	n.unwatch(s)
	n.table.SetImmutable(s.id, false)
}

// Stacked says that a new top was put on the disk's chain: the former is frozen,
// and from now on I/O is that of the new one. Nothing is in flight.
func (d *DiskObserver) Stacked() error {
	s, err := d.naming.addLayer(d.chain.Layers()[0], nil, false)
	if err != nil {
		return fmt.Errorf("name memory by disk %s: %w", d.chain.Path(), err)
	}
	d.Frozen()
	d.below, d.layer = append(d.below, d.layer), s.id
	return nil
}

// Unstacked undoes Stacked, after what was written meanwhile was merged into the
// former top, which is written again. Nothing is in flight.
func (d *DiskObserver) Unstacked() {
	n, top := d.naming, d.layer
	last := len(d.below) - 1
	d.below, d.layer = d.below[:last], d.below[last]
	n.mu.Lock()
	n.find(top).retired = true
	n.mu.Unlock()
	n.table.DropBeyond(top, 0)
	// Which blocks the merge has changed is not worth to be found out.
	n.table.DropBlocks(d.layer, 0, d.chain.Size())
	d.Thawed()
}
