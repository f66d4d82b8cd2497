package archive

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/klauspost/compress/zstd"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
	"ditto.vm/migration/snapshot"
)

// Import makes the folder dir of the archive in r: it holds the snapshot, its
// ancestors and the folder of their layers. The folder must not exist; it
// appears when all was verified.
func Import(ctx context.Context, r io.Reader, dir string, o Options) (_ Report, err error) {
	dir, err = filepath.Abs(dir)
	if err != nil {
		return Report{}, err
	}
	folder, err := snapshot.NewFolder(dir)
	if err != nil {
		return Report{}, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("import to %s: %w", dir, noSpace(err)), folder.Abort())
		}
	}()
	in := &source{r: r}
	zr, err := zstd.NewReader(in, zstd.WithDecoderMaxWindow(window), zstd.WithDecoderLowmem(true))
	if err != nil {
		return Report{}, err
	}
	defer zr.Close()
	x := &importing{ctx: ctx, o: o, dir: folder.Temporary(), in: reader{tar.NewReader(zr)}}
	if err := x.run(zr); err != nil {
		if in.err != nil {
			err = in.err // it is not the archive's fault
		}
		return Report{}, err
	}
	if err := folder.Commit(); err != nil {
		return Report{}, err
	}
	for _, s := range x.index.Snapshots {
		x.report.Snapshots = append(x.report.Snapshots, filepath.Join(dir, s.Name))
	}
	x.report.Images, x.report.Bytes, x.report.Stored = len(x.index.Images), x.done, in.n
	return x.report, nil
}

// source counts what is read and keeps the error of reading.
type source struct {
	r   io.Reader
	n   uint64
	err error
}

func (s *source) Read(p []byte) (int, error) {
	n, err := s.r.Read(p)
	s.n += uint64(n)
	if err != nil && !errors.Is(err, io.EOF) {
		s.err = err
	}
	return n, err
}

// importing is one run of Import.
type importing struct {
	ctx    context.Context
	o      Options
	dir    string // where everything goes
	in     reader
	index  *index
	report Report
	done   uint64
	total  uint64
}

// run unpacks the archive and verifies what it holds. rest is what tar reads
// from.
func (x *importing) run(rest io.Reader) error {
	if err := x.readIndex(); err != nil {
		return err
	}
	manifests, err := x.snapshots()
	if err != nil {
		return err
	}
	if err := x.images(); err != nil {
		return err
	}
	if err := x.end(rest); err != nil {
		return err
	}
	return x.verify(manifests)
}

// damaged is an error of reading a member. What comes from the file system stays
// what it is.
func damaged(name string, err error) error {
	var disk *os.PathError
	if errors.Is(err, context.Canceled) || errors.Is(err, ErrFormat) || errors.As(err, &disk) {
		return err
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return formatError("%s: %v", name, err)
}

// bytes reads a small member.
func (x *importing) bytes(name string, most int64) ([]byte, error) {
	b, err := x.in.bytes(name, most)
	x.moved(int64(len(b)))
	return b, err
}

func (x *importing) readIndex() error {
	b, err := x.bytes(indexName, maxIndex)
	if err != nil {
		return err
	}
	if x.index, err = decodeIndex(b); err != nil {
		return err
	}
	for _, i := range x.index.Images {
		x.total += uint64(i.Size)
	}
	return nil
}

// moved counts what was read.
func (x *importing) moved(n int64) {
	x.done += uint64(n)
	if x.o.Progress != nil {
		x.o.Progress(StepImport, x.done, max(x.done, x.total))
	}
}

// snapshots unpacks the snapshots and returns their manifests.
func (x *importing) snapshots() ([]*snapshot.Manifest, error) {
	var all []*snapshot.Manifest
	for n, e := range x.index.Snapshots {
		m, err := x.snapshot(e)
		if err != nil {
			return nil, err
		}
		all = append(all, m)
		if n > 0 && (all[n-1].Parent == nil || all[n-1].Parent.ID != e.ID) || n == len(x.index.Snapshots)-1 && m.Parent != nil {
			return nil, formatError("snapshot %s and its parent do not follow each other", e.Name)
		}
	}
	return all, nil
}

// snapshot unpacks one snapshot.
func (x *importing) snapshot(e entry) (*snapshot.Manifest, error) {
	dir := filepath.Join(x.dir, e.Name)
	sections := filepath.Join(dir, snapshot.SectionsName)
	if err := os.MkdirAll(sections, 0o700); err != nil {
		return nil, err
	}
	b, err := x.bytes(path.Join(e.Name, snapshot.ManifestName), snapshot.MaxManifest)
	if err != nil {
		return nil, err
	}
	m, id, err := snapshot.ParseManifest(b)
	if err != nil {
		return nil, err
	}
	if id != e.ID {
		return nil, formatError("snapshot %s is %s, not %s", e.Name, id, e.ID)
	}
	files, err := filesOf(m, e.WorkingSet)
	if err != nil {
		return nil, err
	}
	for _, f := range files {
		x.total += uint64(f.size)
	}
	for _, f := range files {
		if err := x.file(path.Join(e.Name, f.name), f.size); err != nil {
			return nil, err
		}
	}
	// As in a save, the manifest is the last.
	if err := x.create(path.Join(e.Name, snapshot.ManifestName), func(f *os.File) error {
		_, err := f.Write(b)
		return err
	}); err != nil {
		return nil, err
	}
	return m, errors.Join(snapshot.SyncDir(sections), snapshot.SyncDir(dir))
}

// file unpacks a member, which must have size bytes, into the file of its name.
// All names are our own or were checked.
func (x *importing) file(name string, size int64) error {
	got, err := x.in.next(name)
	if err != nil {
		return err
	}
	if got != size {
		return formatError("%s has %d bytes and should have %d", name, got, size)
	}
	return x.create(name, func(f *os.File) error {
		if err := writeSparse(x.ctx, f, x.in.tar, size, x.moved); err != nil {
			return damaged(name, err)
		}
		return nil
	})
}

// create makes a file and syncs what fill writes.
func (x *importing) create(name string, fill func(*os.File) error) error {
	f, err := os.OpenFile(filepath.Join(x.dir, filepath.FromSlash(name)), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = fill(f)
	if err == nil {
		err = f.Sync()
	}
	return errors.Join(err, f.Close())
}

// images unpacks the images of layers. They do not change any more.
func (x *importing) images() error {
	dir := filepath.Join(x.dir, snapshot.LayersName)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	for _, i := range x.index.Images {
		if err := x.file(path.Join(snapshot.LayersName, i.Name), i.Size); err != nil {
			return err
		}
		at := filepath.Join(dir, i.Name)
		if i.Format == chain.Qcow2 {
			if err := x.stack(at, i); err != nil {
				return err
			}
		}
		if err := os.Chmod(at, 0o444); err != nil {
			return err
		}
		for _, id := range i.IDs[min(1, len(i.IDs)):] {
			if err := os.Link(at, filepath.Join(dir, snapshot.LayerName(id, i.Format))); err != nil {
				return err
			}
		}
	}
	return snapshot.SyncDir(dir)
}

// stack makes an image say what it is stacked on here: an image that is here
// already, or nothing.
func (x *importing) stack(at string, i image) (err error) {
	f, err := disk.Open(at, disk.Options{Container: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	format := ""
	if n := slices.IndexFunc(x.index.Images, func(b image) bool { return b.Name == i.Below }); n >= 0 {
		format = string(x.index.Images[n].Format)
	}
	if err := qcow2.SetBackingFile(f, i.Below, format); err != nil {
		return formatError("image %s: %v", i.Name, err)
	}
	return nil
}

// end makes sure that nothing follows, and that the sums of what was read are
// right.
func (x *importing) end(rest io.Reader) error {
	if h, err := x.in.tar.Next(); err == nil {
		return formatError("%q follows at the end", h.Name)
	} else if !errors.Is(err, io.EOF) {
		return damaged("the end", err)
	}
	var b [10 << 10]byte // tar fills up to so many
	n, err := io.ReadFull(rest, b[:])
	switch {
	case err == nil || row(b[:n], true) < n:
		return formatError("something follows at the end")
	case !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF):
		return damaged("the end", err)
	}
	return nil
}

// verify reads everything that was unpacked.
func (x *importing) verify(manifests []*snapshot.Manifest) (err error) {
	folders := make(map[snapshot.ID]string)
	for _, e := range x.index.Snapshots {
		folders[e.ID] = filepath.Join(x.dir, e.Name)
	}
	o := snapshot.OpenOptions{
		OpenLayer:  x.openLayer,
		FindParent: func(_ string, p snapshot.Parent) (string, error) { return folders[p.ID], nil },
	}
	first := filepath.Join(x.dir, x.index.Snapshots[0].Name)
	s, err := snapshot.Open(first, o)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	for n, m := range manifests {
		if err := x.checkLayers(filepath.Join(x.dir, x.index.Snapshots[n].Name), m); err != nil {
			return err
		}
	}
	return s.Verify(x.ctx, snapshot.LoadOptions{Progress: x.o.step(StepVerify)})
}

// checkLayers opens the layers of the snapshot in dir that were brought along.
func (x *importing) checkLayers(dir string, m *snapshot.Manifest) error {
	for _, l := range m.Layers {
		if _, brought := snapshot.FindLayer(dir, l); !brought {
			continue // no page is named by it, or Verify says so
		}
		f, err := snapshot.OpenLayer(dir, l)
		if err != nil {
			return fmt.Errorf("%w: %w", snapshot.ErrLayer, err)
		}
		size := f.Size()
		if err := f.Close(); err != nil {
			return err
		}
		if size != l.Size {
			return fmt.Errorf("%w: %s had %d bytes and has %d", snapshot.ErrLayer, l.Path, l.Size, size)
		}
	}
	return nil
}

// openLayer opens a layer that the archive brought along, and none elsewhere.
func (x *importing) openLayer(dir string, l snapshot.Layer) (snapshot.LayerFile, error) {
	if _, brought := snapshot.FindLayer(dir, l); !brought {
		return nil, formatError("layer %s, %s, is not in it", l.ID, l.Path)
	}
	return snapshot.OpenLayer(dir, l)
}
