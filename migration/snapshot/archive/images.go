package archive

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/migration/snapshot"
)

// gathered are the images of all layers that snapshots name, open and locked
// against writers.
type gathered struct {
	images []image
	below  []int      // of images, what each is stacked on, or -1
	files  []*os.File // of images
	chains []*chain.Chain
	byFile map[[2]uint64]int // device and inode: place in images
	byID   map[layer.ID]bool
}

// gather opens the images of the layers of a snapshot and its ancestors. Those
// that pages are named by must be there.
func gather(s *snapshot.Snapshot) (_ *gathered, err error) {
	g := &gathered{byFile: make(map[[2]uint64]int), byID: make(map[layer.ID]bool)}
	defer func() {
		if err != nil {
			err = errors.Join(err, g.close())
		}
	}()
	for at := s; at != nil; at = at.Parent() {
		used := usedLayers(at)
		for i, l := range at.Manifest().Layers {
			if g.byID[l.ID] {
				continue
			}
			err := g.add(at.Dir(), l)
			if !used[i] && errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err != nil {
				return nil, fmt.Errorf("snapshot %s: %w: %s: %w", at.Dir(), snapshot.ErrLayer, l.Path, err)
			}
		}
	}
	g.name()
	return g, nil
}

// usedLayers tells of each layer whether pages are named by it.
func usedLayers(s *snapshot.Snapshot) []bool {
	used := make([]bool, len(s.Manifest().Layers))
	for _, r := range s.Runs() {
		if r.Kind == snapshot.Block {
			used[r.Layer] = true
		}
	}
	return used
}

// add opens the images that a layer is made of, as far as they are not there
// yet, the lowest first.
func (g *gathered) add(dir string, l snapshot.Layer) error {
	path, _ := snapshot.FindLayer(dir, l)
	c, err := chain.Open(path, chain.Options{ReadOnly: true, Format: chain.Format(l.Format), AnyLength: true})
	if err != nil {
		return err
	}
	g.chains = append(g.chains, c)
	below := -1
	for _, part := range slices.Backward(c.Layers()) {
		n, ok := g.byFile[fileKey(part)]
		if !ok {
			if n, err = g.addFile(part, below); err != nil {
				return err
			}
			g.byFile[fileKey(part)] = n
		}
		if g.images[n].Format != part.Format() || g.below[n] != below {
			return fmt.Errorf("%s is used as %s and as %s", part.Path(), g.images[n].Format, part.Format())
		}
		below = n
	}
	g.images[below].IDs = append(g.images[below].IDs, l.ID)
	g.byID[l.ID] = true
	return nil
}

func fileKey(l *chain.Layer) [2]uint64 {
	id := l.File().Identity()
	return [2]uint64{id.Device, id.Inode}
}

// addFile adds an image that is stacked on the one at place below of the list,
// on none if that is -1.
func (g *gathered) addFile(l *chain.Layer, below int) (int, error) {
	size, err := l.File().Length()
	if err != nil {
		return 0, err
	}
	f, err := l.File().Dup()
	if err != nil {
		return 0, err
	}
	g.files = append(g.files, f)
	g.images, g.below = append(g.images, image{Format: l.Format(), Size: size}), append(g.below, below)
	return len(g.images) - 1, nil
}

// name gives images their names when all identities are known.
func (g *gathered) name() {
	for n := range g.images {
		i := &g.images[n]
		if i.Name = i.name(n); g.below[n] >= 0 {
			i.Below = g.images[g.below[n]].Name
		}
	}
}

func (g *gathered) close() error {
	var errs []error
	for _, f := range g.files {
		errs = append(errs, f.Close())
	}
	for _, c := range g.chains {
		errs = append(errs, c.Close())
	}
	return errors.Join(errs...)
}

// folderNames are how the folders of snapshots are called in an archive: as they
// are now, unless that is taken or cannot be.
func folderNames(dirs []string) []string {
	var names []string
	for _, dir := range dirs {
		name := filepath.Base(dir)
		if !validName(name) {
			name = "snapshot"
		}
		for n, base := 2, name; slices.Contains(names, name); n++ {
			name = fmt.Sprintf("%.*s-%d", maxName-10, base, n)
		}
		names = append(names, name)
	}
	return names
}
