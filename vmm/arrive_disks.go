package vmm

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"sync/atomic"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/migration/live"
	"ditto.vm/migration/wire"
	"ditto.vm/vmm/config"
)

// arrivingDisks takes the disks of a VM that arrives without them: the
// [live.BlockTarget].
//
//	plan       what is here is found by its content; the rest is wanted
//	EndImage   an image that nobody writes is proven by its content
//	finish     all is stable, and gets its name: whole, or not at all
//	abandon    nothing is left
type arrivingDisks struct {
	images []*arrivingImage
	bases  []base // by disk: what is here of it
}

// base is what is here of a disk: an image whose content is that of a layer.
type base struct {
	image *chain.Chain // nil for none
	depth int          // of the layer
}

// arrivingImage is an image on its way.
type arrivingImage struct {
	want   live.Image
	id     layer.ID // what it must hold in the end; zero for one that is written
	size   int64
	format chain.Format
	path   string // its name when it is whole
	temp   string // and until then
	below  string // what it is stacked on, "" for nothing
	under  chain.Format
	opened atomic.Pointer[chain.Chain]
	named  bool // it has its name
}

// planDisks finds what is here of the disks of an offer, and makes room for the
// rest. It changes cfg where a disk that nobody writes is here under another path.
func planDisks(ctx context.Context, o *live.Offer, cfg *config.Config) (_ *arrivingDisks, err error) {
	if len(o.Disks) != len(cfg.Disks) {
		return nil, fmt.Errorf("the offered VM: %d disks, and %d are described", len(cfg.Disks), len(o.Disks))
	}
	a := &arrivingDisks{bases: make([]base, len(o.Disks))}
	defer func() {
		if err != nil {
			err = errors.Join(err, a.abandon())
		}
	}()
	cfg.Disks = slices.Clone(cfg.Disks)
	for i := range o.Disks {
		if err := a.planDisk(ctx, o, i, &cfg.Disks[i]); err != nil {
			return nil, fmt.Errorf("disk %d: %w", i, err)
		}
	}
	for _, image := range a.images {
		if image.below != "" && image.waits(a.images) {
			continue // for what it is stacked on
		}
		if err := image.create(); err != nil {
			return nil, err
		}
	}
	return a, nil
}

// planDisk plans one disk: what nobody writes of it, and its top.
func (a *arrivingDisks) planDisk(ctx context.Context, o *live.Offer, n int, here *config.Disk) error {
	d := &o.Disks[n]
	if len(d.Layers) == 0 {
		return errors.New("the offered VM: it is made of nothing")
	}
	first := 1
	if d.ReadOnly {
		first = 0
	}
	search := finder{dirs: []string{filepath.Dir(here.Path)}, paths: append([]string{here.Path}, o.Bases...)}
	for depth := first; depth < len(d.Layers) && a.bases[n].image == nil; depth++ {
		found, err := search.find(ctx, d.Layers[depth])
		if err != nil {
			return err
		}
		a.bases[n] = base{found, depth}
	}
	below, under := "", chain.Probe
	if a.bases[n].image != nil {
		below, under = a.bases[n].image.Path(), a.bases[n].image.Layers()[0].Format()
	}
	if first < len(d.Layers) && (a.bases[n].image == nil || a.bases[n].depth > first) {
		missing := d.Layers[first]
		if !o.CopyLayers {
			return fmt.Errorf("nothing here holds what %s does (%s): copy it to here and name it with 'ditto receive --base PATH', or let it be sent with 'ditto migrate --copy-layers'", missing.Path, missing.ID)
		}
		image, err := a.add(o, live.Image{Disk: uint16(n), Depth: uint16(first), Floor: a.floor(n)}, here.Path, below, under)
		if err != nil {
			return err
		}
		below, under = image.path, image.format
	}
	if d.ReadOnly {
		here.Path, here.Format = below, under
		return nil
	}
	want := live.Image{Disk: uint16(n), Floor: wire.NoFloor}
	if len(d.Layers) > 1 {
		want.Floor = 1
	}
	_, err := a.add(o, want, here.Path, below, under)
	return err
}

// floor is the depth of what is here of a disk.
func (a *arrivingDisks) floor(n int) uint16 {
	if a.bases[n].image == nil {
		return wire.NoFloor
	}
	return uint16(a.bases[n].depth)
}

// add plans an image, beside the disk that it is of.
func (a *arrivingDisks) add(o *live.Offer, want live.Image, disk, below string, under chain.Format) (*arrivingImage, error) {
	l := o.Disks[want.Disk].Layers[want.Depth]
	image := &arrivingImage{want: want, size: l.Size, format: chain.Format(l.Format), path: disk, below: below, under: under}
	if want.Depth > 0 || o.Disks[want.Disk].ReadOnly {
		image.id = l.ID
	}
	if want.Depth > 0 {
		image.path = filepath.Join(filepath.Dir(disk), filepath.Base(l.Path))
	}
	if below != "" {
		image.format = chain.Qcow2
	}
	if image.format != chain.Raw && image.format != chain.Qcow2 {
		return nil, fmt.Errorf("the offered VM: an image of the format %.20q", l.Format)
	}
	if err := image.makeRoom(); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(a.images, func(other *arrivingImage) bool { return other.path == image.path }) {
		return nil, fmt.Errorf("two images would be %s: say where disks go with 'ditto receive --disk N=PATH'", image.path)
	}
	var random [4]byte
	if _, err := rand.Read(random[:]); err != nil {
		return nil, err
	}
	image.temp = filepath.Join(filepath.Dir(image.path), "."+filepath.Base(image.path)+"."+hex.EncodeToString(random[:])+".part")
	a.images = append(a.images, image)
	return image, nil
}

// makeRoom refuses to replace a file. An empty one is what is left of a migration
// that failed when no files could be removed any more.
func (i *arrivingImage) makeRoom() error {
	st, err := os.Lstat(i.path)
	switch {
	case errors.Is(err, os.ErrNotExist):
		return nil
	case err == nil && st.Mode().IsRegular() && st.Size() == 0:
		return os.Remove(i.path)
	case err == nil:
		err = os.ErrExist
	}
	return &disk.Error{Path: i.path, Err: err, Reason: "is in the way of the copy: " + err.Error(), Cure: "remove it, or say with 'ditto receive --disk N=PATH' where the copy goes"}
}

// waits reports whether an image is stacked on one that is on its way, too.
func (i *arrivingImage) waits(all []*arrivingImage) bool {
	return slices.ContainsFunc(all, func(o *arrivingImage) bool { return o.path == i.below && !o.named })
}

// create makes the image, empty, under its temporary name.
func (i *arrivingImage) create() error {
	var err error
	switch {
	case i.below != "":
		err = chain.CreateOverlay(i.temp, i.below, i.under, i.size)
	default:
		err = chain.Create(i.temp, i.format, i.size)
	}
	if err != nil {
		return err
	}
	c, err := chain.Open(i.temp, chain.Options{Format: i.format})
	if err != nil {
		return errors.Join(err, os.Remove(i.temp))
	}
	i.opened.Store(c)
	return nil
}

// Blocks implements [live.Arrival].
func (a *Arrival) Blocks() live.BlockTarget {
	if a.copies == nil {
		return nil
	}
	return a.copies
}

// Images implements [live.BlockTarget].
func (a *arrivingDisks) Images() (all []live.Image) {
	for _, i := range a.images {
		all = append(all, i.want)
	}
	return all
}

// errNotYet is of an image that is stacked on one that is not there.
var errNotYet = errors.New("what it is stacked on did not come yet")

func (a *arrivingDisks) at(n int) (*chain.Chain, error) {
	if c := a.images[n].opened.Load(); c != nil {
		return c, nil
	}
	return nil, fmt.Errorf("disk %s: %w", a.images[n].path, errNotYet)
}

// WriteBlocks implements [live.BlockTarget].
func (a *arrivingDisks) WriteBlocks(n int, p []byte, offset int64) error {
	c, err := a.at(n)
	if err != nil {
		return err
	}
	return c.WriteAtv([][]byte{p}, offset)
}

// ZeroBlocks implements [live.BlockTarget].
func (a *arrivingDisks) ZeroBlocks(n int, offset, length int64) error {
	c, err := a.at(n)
	if err != nil {
		return err
	}
	return c.WriteZeroes(offset, length, true)
}

// EndImage implements [live.BlockTarget].
func (a *arrivingDisks) EndImage(ctx context.Context, n int) error {
	c, err := a.at(n)
	if err != nil {
		return err
	}
	image := a.images[n]
	if err := c.Flush(); err != nil {
		return err
	}
	if image.id == (layer.ID{}) {
		return nil // the top: it is proven block by block, and written on
	}
	id, err := index.Identify(ctx, c.Layers()[0])
	if err != nil {
		return err
	}
	if id != image.id {
		return fmt.Errorf("the copy of %s holds something else (%s) than was offered (%s): it was damaged on its way, or changed there", image.path, id, image.id)
	}
	if err := image.finish(); err != nil {
		return err
	}
	for _, above := range a.images {
		if above.below == image.path && above.opened.Load() == nil {
			if err := above.create(); err != nil {
				return err
			}
		}
	}
	return nil
}

// finish makes the image stable and gives it its name.
func (i *arrivingImage) finish() error {
	c := i.opened.Swap(nil)
	if c == nil {
		if i.named {
			return nil
		}
		return fmt.Errorf("disk %s: %w", i.path, errNotYet)
	}
	if err := errors.Join(c.Flush(), c.Close()); err != nil {
		return err
	}
	if err := os.Link(i.temp, i.path); err != nil {
		return err
	}
	i.named = true
	if err := os.Remove(i.temp); err != nil {
		return err
	}
	return syncFolder(filepath.Dir(i.path))
}

// syncFolder makes the names in a folder stable.
func syncFolder(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// finish makes all images stable, with their names.
func (a *arrivingDisks) finish() error {
	if a == nil {
		return nil
	}
	for _, i := range a.images {
		if err := i.finish(); err != nil {
			return err
		}
	}
	return a.closeBases()
}

// abandon removes what came. Where files cannot be removed any more, since the
// process has given up that right, those of the VM's disks that it has open are
// emptied: what is left does not look whole.
func (a *arrivingDisks) abandon(open ...vmDisk) error {
	if a == nil {
		return nil
	}
	errs := []error{a.closeBases()}
	for _, i := range a.images {
		if c := i.opened.Swap(nil); c != nil {
			errs = append(errs, c.Close())
		}
		err := os.Remove(i.temp)
		if i.named {
			if err = os.Remove(i.path); err != nil {
				err = errors.Join(err, empty(i.path, open))
			}
		}
		if !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	a.images = nil
	return errors.Join(errs...)
}

// empty cuts the file at path to nothing.
func empty(path string, open []vmDisk) error {
	for _, d := range open {
		top := d.image.Layers()[0]
		if top.Path() != path || d.image.ReadOnly() {
			continue
		}
		f, err := top.File().Dup()
		if err != nil {
			return err
		}
		return errors.Join(f.Truncate(0), f.Close())
	}
	return nil
}

func (a *arrivingDisks) closeBases() error {
	var errs []error
	for n := range a.bases {
		if c := a.bases[n].image; c != nil {
			errs = append(errs, c.Close())
			a.bases[n].image = nil
		}
	}
	return errors.Join(errs...)
}

// reader reads a layer of a disk from what is here of it, nil for nothing.
func (a *arrivingDisks) reader(l live.Layer) io.ReaderAt {
	for _, i := range a.images {
		if int(i.want.Disk) == l.Disk && int(i.want.Depth) == l.Depth {
			return imageReader{i}
		}
	}
	if l.Disk >= len(a.bases) || a.bases[l.Disk].image == nil {
		return nil
	}
	// Below the base the layers may be the same, and every page is proven.
	layers := a.bases[l.Disk].image.Layers()
	if at := l.Depth - a.bases[l.Disk].depth; at >= 0 && at < len(layers) && (at == 0 || layers[at].Size() == l.Size) {
		return layers[at]
	}
	return nil
}

// imageReader reads an image that is on its way.
type imageReader struct{ i *arrivingImage }

// ReadAt implements io.ReaderAt.
func (r imageReader) ReadAt(p []byte, offset int64) (int, error) {
	c := r.i.opened.Load()
	if c == nil {
		return 0, errNotYet
	}
	return c.Layers()[0].ReadAt(p, offset)
}

// finder looks for an image of some content.
type finder struct{ dirs, paths []string }

// find returns an image that holds what a layer does, opened for reading, or nil.
// Where the layer was there, what has its name here, and what the user names are
// read if they have no index; in the folder of the disk only indexes are looked
// at.
func (f *finder) find(ctx context.Context, l live.DiskLayer) (*chain.Chain, error) {
	if l.ID.Kind() != layer.Content {
		return nil, fmt.Errorf("the offered VM: %s has no identity", l.Path)
	}
	paths := append([]string{l.Path}, f.paths...)
	for _, dir := range f.dirs {
		paths = append(paths, filepath.Join(dir, filepath.Base(l.Path)))
	}
	for _, path := range paths {
		if c := openIf(ctx, path, l, true); c != nil || ctx.Err() != nil {
			return c, context.Cause(ctx)
		}
	}
	for _, dir := range f.dirs {
		indexes, err := filepath.Glob(filepath.Join(dir, "*"+index.Beside("")))
		if err != nil {
			continue
		}
		for _, at := range indexes {
			if c := openIf(ctx, at[:len(at)-len(index.Beside(""))], l, false); c != nil {
				return c, nil
			}
		}
	}
	return nil, nil
}

// indexSamples is how many blocks are compared with an index before it is
// believed.
const indexSamples = 64

// openIf opens an image if its content is that of a layer. Without an index it is
// read if that is wanted. What cannot be opened is not it.
func openIf(ctx context.Context, path string, l live.DiskLayer, read bool) *chain.Chain {
	if st, err := os.Stat(path); err != nil || st.Mode().IsDir() || st.Size() == 0 {
		return nil
	}
	c, err := chain.Open(path, chain.Options{ReadOnly: true, AnyLength: true})
	if err != nil {
		return nil
	}
	if top := c.Layers()[0]; top.Size() == l.Size {
		if id, ok := indexed(top); ok && id == l.ID {
			return c
		} else if !ok && read {
			if id, err := index.Identify(ctx, top); err == nil && id == l.ID {
				return c
			}
		}
	}
	_ = c.Close() // it was only read
	return nil
}

// indexed returns what the index beside an image says that it holds.
func indexed(l *chain.Layer) (layer.ID, bool) {
	x, err := index.Open(index.Beside(l.Path()))
	if err != nil {
		return layer.ID{}, false
	}
	id := x.LayerID()
	if err := errors.Join(x.Check(l, indexSamples), x.Close()); err != nil {
		return layer.ID{}, false
	}
	return id, true
}

// provenShared returns an error unless a disk is the file that the source has.
func provenShared(d *live.Disk, here *chain.Chain) error {
	if here.SeesWitness(d.Witness) {
		return nil
	}
	return fmt.Errorf("%s is not the file %s that the VM uses over there: share it, or have it copied with 'ditto migrate --disks copy'", here.Path(), d.Path)
}
