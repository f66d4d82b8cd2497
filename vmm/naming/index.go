package naming

import (
	"errors"
	"io/fs"

	"ditto.vm/images/index"
	"ditto.vm/images/layer"
)

// indexSamples is how many blocks are compared with an index when it is opened,
// besides the layer's stamp: 0.1 s of a slow disk.
const indexSamples = 16

// openIndex opens the index beside a disk, or returns nil. A bad one is no
// error: fewer pages get names.
func (n *Naming) openIndex(d Disk) *guardedIndex {
	path := index.Beside(d.Path)
	g, err := openGuarded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = checkIndex(g.index, d.Path)
	}
	if err != nil {
		if g != nil {
			err = errors.Join(err, g.Close())
		}
		n.log.Warn("an image's index is not used; names will be found without", "image", d.Path, "index", path,
			"err", err, "cure", "ditto image index "+d.Path)
		return nil
	}
	return g
}

// checkIndex compares an index with the image as it is now.
func checkIndex(x *index.Index, path string) error {
	src, err := layer.OpenFile(path)
	if err != nil {
		return err
	}
	return errors.Join(x.Check(src, indexSamples), src.Close())
}
