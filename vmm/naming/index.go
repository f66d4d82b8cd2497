package naming

import (
	"errors"
	"io/fs"

	"ditto.vm/images/chain"
	"ditto.vm/images/index"
)

// indexSamples is how many blocks are compared with an index when it is opened,
// besides the layer's stamp: 0.1 s of a slow disk.
const indexSamples = 16

// openIndex opens the index beside an image, or returns nil. A bad one is no
// error: fewer pages get names.
func (n *Naming) openIndex(l *chain.Layer) *guardedIndex {
	path := index.Beside(l.Path())
	g, err := openGuarded(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = g.index.Check(l, indexSamples)
	}
	if err != nil {
		if g != nil {
			err = errors.Join(err, g.Close())
		}
		n.log.Warn("an image's index is not used; names will be found without", "image", l.Path(), "index", path,
			"err", err, "cure", "ditto image index "+l.Path())
		return nil
	}
	return g
}
