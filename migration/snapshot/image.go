package snapshot

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/images/qcow2"
)

// LayersName is the folder beside snapshots for layers that were brought there
// with them.
const LayersName = "layers"

// LayerName is how the file of a layer is called in the folder [LayersName].
func LayerName(id layer.ID, format chain.Format) string {
	return id.String() + "." + string(format)
}

// FindLayer returns where a layer of the snapshot in dir is: in the folder
// [LayersName] beside the snapshot, where it was brought with it, or else where
// the snapshot says.
func FindLayer(dir string, l Layer) (path string, brought bool) {
	format := chain.Format(l.Format)
	if format == chain.Raw || format == chain.Qcow2 {
		path = filepath.Join(filepath.Dir(dir), LayersName, LayerName(l.ID, format))
		// Not one that leads elsewhere.
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
			return path, true
		}
	}
	return beside(dir, l.Path), false
}

// Locate returns where the layer is now that was at path when the snapshot was
// written, as its configuration says. ok is false when there was none.
func (s *Snapshot) Locate(path string) (found string, l Layer, ok bool) {
	path = beside(s.dir, path)
	for _, l := range s.m.Layers {
		if beside(s.dir, l.Path) == filepath.Clean(path) {
			found, _ = FindLayer(s.dir, l)
			return found, l, true
		}
	}
	return "", Layer{}, false
}

// image is a layer that is open with all that it is stacked on, locked against
// writers.
type image struct {
	chain *chain.Chain
	top   *chain.Layer
	size  int64 // bytes
	files map[*chain.Layer]imageFile
}

// imageFile is a file of an image, for mapping it.
type imageFile struct {
	*os.File
	length int64 // bytes
}

// OpenLayer opens a layer of the snapshot in dir as [Open] does: the image that
// [FindLayer] finds, with all that it is stacked on, locked against writers.
func OpenLayer(dir string, l Layer) (_ LayerFile, err error) {
	format := chain.Format(l.Format)
	if format != chain.Raw && format != chain.Qcow2 {
		return nil, fmt.Errorf("format %s cannot be read here", l.Format)
	}
	path, _ := FindLayer(dir, l)
	c, err := chain.Open(path, chain.Options{ReadOnly: true, Format: format, AnyLength: true})
	if err != nil {
		return nil, err
	}
	i := &image{chain: c, top: c.Layers()[0], size: c.Size(), files: make(map[*chain.Layer]imageFile)}
	for _, part := range c.Layers() {
		f, err := openImageFile(part)
		if err != nil {
			return nil, errors.Join(err, i.Close())
		}
		i.files[part] = f
	}
	// Zeros fill the last sector of a raw image, but whoever read only the file
	// did not count them.
	if length := i.files[i.top].length; format == chain.Raw && l.Size == length {
		i.size = length
	}
	return i, nil
}

func openImageFile(l *chain.Layer) (imageFile, error) {
	length, err := l.File().Length()
	if err != nil {
		return imageFile{}, err
	}
	f, err := l.File().Dup()
	return imageFile{f, length}, err
}

// ReadAt implements [LayerFile].
func (i *image) ReadAt(p []byte, off int64) (int, error) { return i.top.ReadAt(p, off) }

// Size implements [LayerFile].
func (i *image) Size() int64 { return i.size }

// Stamp implements [LayerFile].
func (i *image) Stamp() (layer.Stamp, error) {
	s, err := i.top.Stamp()
	s.Size = i.size
	return s, err
}

// Extent implements [Extenter]. What lies beyond the end of a file cannot be
// mapped, though it reads as zeros.
func (i *image) Extent(off int64) (f *os.File, at, size int64) {
	e, err := i.chain.Map(off, i.chain.Size()-off)
	if err != nil || e.Layer == nil || e.Kind != qcow2.Data {
		return nil, 0, 0
	}
	file := i.files[e.Layer]
	if size = min(e.Length, file.length-e.Host); size <= 0 {
		return nil, 0, 0
	}
	return file.File, e.Host, size
}

// Close implements [LayerFile].
func (i *image) Close() error {
	var errs []error
	for _, f := range i.files {
		errs = append(errs, f.Close())
	}
	return errors.Join(append(errs, i.chain.Close())...)
}
