package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"ditto.vm/migration/snapshot"
)

// window is how far back compressed data refer, in bytes: what reading takes.
const window = 8 << 20

// Options of Export and Import.
type Options struct {
	// Ditto is the version of the program, for Export.
	Ditto string
	// Progress hears how many bytes are done of a step, if not nil. It must not
	// block.
	Progress func(step string, done, total uint64)
}

// The steps that Progress hears of.
const (
	StepVerify = "verify"
	StepExport = "export"
	StepImport = "import"
)

// Report says what was exported or imported.
type Report struct {
	// Snapshots are the folders, the snapshot first and then its ancestors.
	Snapshots []string `json:"snapshots"`
	// Images counts the files of layers.
	Images int `json:"images"`
	// Bytes is the size of all files together, Stored that of the archive.
	Bytes  uint64 `json:"bytes"`
	Stored uint64 `json:"stored"`
}

// Export writes the snapshot in the folder dir with all that it needs, after
// everything was verified.
func Export(ctx context.Context, dir string, w io.Writer, o Options) (_ Report, err error) {
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, s.Close()) }()
	g, err := gather(s)
	if err != nil {
		return Report{}, err
	}
	defer func() { err = errors.Join(err, g.close()) }()
	if err := s.Verify(ctx, snapshot.LoadOptions{Progress: o.step(StepVerify)}); err != nil {
		return Report{}, err
	}
	x := &exporting{ctx: ctx, o: o, s: s, g: g, out: &counter{w: w}}
	if err := x.run(); err != nil {
		return Report{}, fmt.Errorf("export snapshot %s: %w", s.Dir(), err)
	}
	return x.report, nil
}

// step returns what hears of a step.
func (o *Options) step(name string) func(done, total uint64) {
	if o.Progress == nil {
		return nil
	}
	return func(done, total uint64) { o.Progress(name, done, total) }
}

// counter counts what is written.
type counter struct {
	w io.Writer
	n uint64
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += uint64(n)
	return n, err
}

// exporting is one run of Export.
type exporting struct {
	ctx    context.Context
	o      Options
	s      *snapshot.Snapshot
	g      *gathered
	out    *counter
	report Report
	done   uint64
}

func (x *exporting) run() error {
	list, err := x.list()
	if err != nil {
		return err
	}
	first, err := list.encode()
	if err != nil {
		return err
	}
	members, err := x.members(list)
	if err != nil {
		return err
	}
	x.report.Bytes = uint64(len(first))
	for _, m := range members {
		x.report.Bytes += uint64(m.size)
	}
	if err := x.write(first, members); err != nil {
		return err
	}
	x.report.Images, x.report.Stored = len(list.Images), x.out.n
	return nil
}

// list makes the first member.
func (x *exporting) list() (*index, error) {
	for at := x.s; at != nil; at = at.Parent() {
		x.report.Snapshots = append(x.report.Snapshots, at.Dir())
	}
	names := folderNames(x.report.Snapshots)
	list := &index{Format: Format, Ditto: x.o.Ditto, Images: x.g.images}
	for at := x.s; at != nil; at = at.Parent() {
		e := entry{Name: names[len(list.Snapshots)], ID: at.ID()}
		info, err := os.Lstat(filepath.Join(at.Dir(), snapshot.WorkingSet))
		switch {
		case err == nil && info.Mode().IsRegular():
			e.WorkingSet = info.Size()
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		list.Snapshots = append(list.Snapshots, e)
	}
	return list, list.check()
}

// member is a file of an archive.
type member struct {
	name string
	size int64
	// dir and file are where it is in a snapshot, or image is it.
	dir, file string
	image     *os.File
}

// members lists what follows the first.
func (x *exporting) members(list *index) ([]member, error) {
	var all []member
	n := 0
	for at := x.s; at != nil; at = at.Parent() {
		files, err := filesOf(at.Manifest(), list.Snapshots[n].WorkingSet)
		if err != nil {
			return nil, err
		}
		info, err := os.Stat(filepath.Join(at.Dir(), snapshot.ManifestName))
		if err != nil {
			return nil, err
		}
		for _, f := range append([]file{{snapshot.ManifestName, info.Size()}}, files...) {
			all = append(all, member{name: path.Join(list.Snapshots[n].Name, f.name), size: f.size, dir: at.Dir(), file: f.name})
		}
		n++
	}
	for i, image := range list.Images {
		all = append(all, member{name: path.Join(snapshot.LayersName, image.Name), size: image.Size, image: x.g.files[i]})
	}
	return all, nil
}

// file is a file of a snapshot and its size.
type file struct {
	name string
	size int64
}

// filesOf lists the files that follow a manifest.
func filesOf(m *snapshot.Manifest, workingSet int64) ([]file, error) {
	all := []file{{snapshot.PageMapName, int64(m.PageMap.Size)}, {snapshot.PagesName, int64(m.Pages.Size)}}
	for _, s := range m.Sections {
		all = append(all, file{path.Join(snapshot.SectionsName, s.Name), int64(s.Size)})
	}
	if workingSet > 0 {
		all = append(all, file{snapshot.WorkingSet, workingSet})
	}
	for _, f := range all {
		if f.size < 0 || f.size > maxFile {
			return nil, formatError("%s of %d bytes", f.name, uint64(f.size))
		}
	}
	return all, nil
}

// write writes all members.
func (x *exporting) write(first []byte, members []member) error {
	zw, err := zstd.NewWriter(x.out, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(window))
	if err != nil {
		return err
	}
	w := newWriter(zw, x.s.Manifest().Created)
	err = w.bytes(indexName, first)
	x.moved(int64(len(first)))
	for _, m := range members {
		if err == nil {
			err = x.member(w, m)
		}
	}
	if err == nil {
		err = w.close()
	}
	return errors.Join(err, zw.Close())
}

func (x *exporting) member(w *writer, m member) error {
	if m.image != nil {
		return w.file(x.ctx, m.name, m.image, m.size, x.moved)
	}
	f, err := snapshot.OpenFile(m.dir, m.file)
	if err != nil {
		return err
	}
	return errors.Join(w.file(x.ctx, m.name, f, m.size, x.moved), f.Close())
}

// moved counts what was written.
func (x *exporting) moved(n int64) {
	x.done += uint64(n)
	if x.o.Progress != nil {
		x.o.Progress(StepExport, x.done, x.report.Bytes)
	}
}

// ExportFile is Export to a file, which appears under its name when it is
// complete and never takes the place of another.
func ExportFile(ctx context.Context, dir, name string, o Options) (_ Report, err error) {
	if _, err := os.Lstat(name); err == nil {
		return Report{}, fmt.Errorf("%s: %w", name, snapshot.ErrExists)
	}
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".partial-*")
	if err != nil {
		return Report{}, fmt.Errorf("export: %w", err)
	}
	r, err := Export(ctx, dir, f, o)
	if err == nil {
		err = errors.Join(f.Chmod(0o644), f.Sync())
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = appear(f.Name(), name)
	}
	if err != nil {
		return Report{}, errors.Join(noSpace(err), os.Remove(f.Name()))
	}
	return r, snapshot.SyncDir(filepath.Dir(name))
}

// appear gives a file its name.
func appear(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// The file system cannot, but makes links.
		if err = os.Link(from, to); err == nil {
			err = os.Remove(from)
		}
	}
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s: %w", to, snapshot.ErrExists)
	}
	return err
}

// noSpace adds to an error that the disk is full, if it is.
func noSpace(err error) error {
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fmt.Errorf("%w: %w", snapshot.ErrNoSpace, err)
	}
	return err
}
