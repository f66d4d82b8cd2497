package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"ditto.vm/memory"
)

// Snapshot is an open snapshot, with its ancestors. Its methods may be called
// from any goroutine until Close.
type Snapshot struct {
	dir      string
	m        *Manifest
	id       ID
	p        *pageMap
	sections []Section
	digests  *os.File // the page map, whose digests are read when they are wanted
	pages    *os.File
	parent   *Snapshot
	// flat is memory without references to parents; nil where there is no parent.
	flat   []flatRun
	layers layerSet
	o      OpenOptions
}

// OpenOptions say where things are. The zero value looks where the snapshot
// says.
type OpenOptions struct {
	// OpenLayer opens a layer of the snapshot in dir. Nil opens the image that
	// [FindLayer] finds, with all that it is stacked on.
	OpenLayer func(dir string, l Layer) (LayerFile, error)
	// FindParent returns the folder of the parent of the snapshot in dir. Nil
	// looks where the snapshot says, and then beside it.
	FindParent func(dir string, p Parent) (string, error)
	// OpenFile opens a file of the snapshot in dir for reading, by its name in
	// the format. Nil opens it there; a process that may not can have it done by
	// another.
	OpenFile func(dir, name string) (*os.File, error)

	shared *sharedLayers // of the snapshot that was opened and its ancestors
}

// complete fills in what is nil.
func (o *OpenOptions) complete() {
	if o.OpenFile == nil {
		o.OpenFile = OpenFile
	}
	if o.OpenLayer == nil {
		o.OpenLayer = OpenLayer
	}
	if o.FindParent == nil {
		o.FindParent = o.findParent
	}
}

// Open opens the snapshot in the folder dir, and checks all of it but the bytes
// of pages and layers. Layers need not be there until pages are read.
func Open(dir string, o OpenOptions) (*Snapshot, error) {
	o.shared = new(sharedLayers)
	return open(dir, o, nil, 1)
}

// open opens a snapshot, whose identity must be want, if not nil, in a chain
// that is so long already.
func open(dir string, o OpenOptions, want *ID, chain int) (_ *Snapshot, err error) {
	o.complete()
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	s := &Snapshot{dir: dir, o: o}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("snapshot %s: %w", dir, err), s.Close())
		}
	}()
	if err := s.readManifest(); err != nil {
		return nil, err
	}
	if want != nil && s.id != *want {
		return nil, fmt.Errorf("%w: it is %s, and %s is wanted", ErrParent, s.id, *want)
	}
	if chain+s.m.Depth() > MaxChain {
		return nil, formatError("a chain of more than %d snapshots", MaxChain)
	}
	if err := s.readFiles(); err != nil {
		return nil, err
	}
	if s.m.Parent != nil {
		if err := s.openParent(chain); err != nil {
			return nil, err
		}
	}
	s.flatten()
	return s, nil
}

func (s *Snapshot) readManifest() error {
	f, size, err := s.openFile(ManifestName)
	if err != nil {
		return err
	}
	defer f.Close()
	if size > MaxManifest {
		return formatError("manifest: %d bytes are more than %d", size, MaxManifest)
	}
	b := make([]byte, size)
	if err := readFull(f, b, 0); err != nil {
		return fmt.Errorf("manifest: %w", err)
	}
	s.m, s.id, err = ParseManifest(b)
	return err
}

// OpenFile opens a file of the snapshot in dir as [Open] does, by its name in the
// format. It does not lead out of the folder.
func OpenFile(dir, name string) (*os.File, error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// O_NONBLOCK: a FIFO of that name must not hang.
	f, err := root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", ErrFormat, err)
	}
	return f, err
}

// openFile opens a file of the snapshot, which is a file indeed.
func (s *Snapshot) openFile(name string) (*os.File, uint64, error) {
	f, err := s.o.OpenFile(s.dir, name)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = formatError("%s is not a file", name)
	}
	if err != nil {
		return nil, 0, errors.Join(err, f.Close())
	}
	return f, uint64(info.Size()), nil
}

// readFile reads a file that the manifest describes.
func (s *Snapshot) readFile(name string, want File) ([]byte, error) {
	f, size, err := s.openFile(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if size != want.Size {
		return nil, formatError("%s has %d bytes and should have %d", name, size, want.Size)
	}
	b := make([]byte, size)
	if err := readFull(f, b, 0); err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	if digestOf(b) != want.Digest {
		return nil, formatError("%s was altered", name)
	}
	return b, nil
}

// readFiles reads the head of the page map and the sections, and opens pages.
func (s *Snapshot) readFiles() error {
	if err := s.readPageMap(); err != nil {
		return err
	}
	switch {
	case s.p.compressed() != (s.m.Compression == Zstd):
		return formatError("compression %s, and %d frames", s.m.Compression, len(s.p.frames))
	case s.p.pagesSize != s.m.Pages.Size:
		return formatError("manifest and page map do not agree on pages")
	case s.p.holds != s.m.Holds:
		return formatError("manifest and page map do not agree on what is held")
	}
	var size uint64
	var err error
	if s.pages, size, err = s.openFile(PagesName); err != nil {
		return err
	}
	if size != s.m.Pages.Size {
		return formatError("%s has %d bytes and should have %d", PagesName, size, s.m.Pages.Size)
	}
	for _, f := range s.m.Sections {
		b, err := s.readFile(SectionsName+"/"+f.Name, f.File)
		if err != nil {
			return err
		}
		s.sections = append(s.sections, Section{Name: f.Name, Version: f.Version, Bytes: b})
	}
	return nil
}

// readPageMap reads what of the page map proves the rest of it.
func (s *Snapshot) readPageMap() error {
	var size uint64
	var err error
	if s.digests, size, err = s.openFile(PageMapName); err != nil {
		return err
	}
	if size != s.m.PageMap.Size {
		return formatError("%s has %d bytes and should have %d", PageMapName, size, s.m.PageMap.Size)
	}
	head := make([]byte, min(size, headerSize))
	if err := readFull(s.digests, head, 0); err != nil {
		return fmt.Errorf("%s: %w", PageMapName, err)
	}
	_, counts, err := readHeader(head, s.m.scope())
	if err != nil {
		return err
	}
	if headSize(counts) > size {
		return formatError("page map: it has %d bytes and should have more: truncated", size)
	}
	head = make([]byte, headSize(counts))
	if err := readFull(s.digests, head, 0); err != nil {
		return fmt.Errorf("%s: %w", PageMapName, err)
	}
	if digestOf(head) != s.m.PageMap.Digest {
		return formatError("%s was altered", PageMapName)
	}
	if s.p, err = decodePageMap(head, size, s.m.scope()); err != nil {
		return err
	}
	s.p.table.file = s.digests
	return nil
}

func (s *Snapshot) openParent(chain int) error {
	p := *s.m.Parent
	dir, err := s.o.FindParent(s.dir, p)
	if err != nil {
		return fmt.Errorf("%w: %w", ErrParent, err)
	}
	if s.parent, err = open(dir, s.o, &p.ID, chain+1); err != nil {
		return fmt.Errorf("%w: %w", ErrParent, err)
	}
	if s.parent.m.Depth()+1 != p.Depth || s.parent.m.Memory.Size != s.m.Memory.Size {
		return formatError("it is the %d. of a chain with a memory of %d bytes, and its parent the %d. with %d",
			p.Depth, s.m.Memory.Size, s.parent.m.Depth(), s.parent.m.Memory.Size)
	}
	return nil
}

// beside returns the path that a snapshot in dir states.
func beside(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

// findParent looks for a parent where it was, and then among the neighbours.
func (o *OpenOptions) findParent(dir string, p Parent) (string, error) {
	stated := beside(dir, p.Path)
	id, err := o.identify(stated)
	if err == nil && id == p.ID {
		return stated, nil
	}
	entries, readErr := os.ReadDir(filepath.Dir(dir))
	if readErr != nil {
		return "", errors.Join(err, readErr)
	}
	for _, e := range entries {
		path := filepath.Join(filepath.Dir(dir), e.Name())
		if id, err := o.identify(path); err == nil && id == p.ID {
			return path, nil
		}
	}
	if err != nil {
		return "", fmt.Errorf("%s is neither at %s nor beside the snapshot: %w", p.ID, stated, err)
	}
	return "", fmt.Errorf("%s is %s, not %s, nor is that beside the snapshot", stated, id, p.ID)
}

// identify reads the manifest in a folder.
func (o *OpenOptions) identify(dir string) (ID, error) {
	s := Snapshot{dir: dir, o: *o}
	err := s.readManifest()
	return s.id, err
}

// Close closes the snapshot and its ancestors.
func (s *Snapshot) Close() error {
	errs := []error{s.layers.close()}
	for _, f := range []*os.File{s.digests, s.pages} {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	if s.parent != nil {
		errs = append(errs, s.parent.Close())
	}
	return errors.Join(errs...)
}

// Retire gives back what reading pages takes, of the snapshot and its ancestors:
// after a restore that is complete. The layers stay open until Close, and so
// nobody writes what is mapped. Nothing else may be asked of it any more.
func (s *Snapshot) Retire() error {
	var errs []error
	for ; s != nil; s = s.parent {
		for _, f := range []**os.File{&s.digests, &s.pages} {
			if *f != nil {
				errs = append(errs, (*f).Close())
				*f = nil
			}
		}
		s.p, s.flat, s.sections = nil, nil, nil
	}
	return errors.Join(errs...)
}

// ID returns the snapshot's identity.
func (s *Snapshot) ID() ID { return s.id }

// Dir returns the folder it was opened from.
func (s *Snapshot) Dir() string { return s.dir }

// Manifest returns what the snapshot is of. It must not be changed.
func (s *Snapshot) Manifest() *Manifest { return s.m }

// Parent returns the snapshot that this one adds to, or nil.
func (s *Snapshot) Parent() *Snapshot { return s.parent }

// Sections returns the state of devices and vCPUs, in the order of saving. The
// bytes must not be changed.
func (s *Snapshot) Sections() []Section { return s.sections }

// Runs returns what memory equals, in ascending order. It must not be changed.
func (s *Snapshot) Runs() []Run { return s.p.runs }

// flatRun is a run as the snapshot says that holds it: src's run at place i, or
// a part of it.
type flatRun struct {
	Run
	src *Snapshot
	i   int
}

// flatten replaces references to the parent by what the parent says. Page runs
// stay, and refer to the pages of src.
func (s *Snapshot) flatten() {
	if s.parent == nil {
		return
	}
	j := 0
	s.flat = make([]flatRun, 0, len(s.p.runs))
	for i, r := range s.p.runs {
		if r.Kind != FromParent {
			s.flat = append(s.flat, flatRun{r, s, i})
			continue
		}
		for s.parent.run(j).End() <= r.Start {
			j++
		}
		for k := j; k < s.parent.runs() && s.parent.run(k).Start < r.End(); k++ {
			f := s.parent.run(k)
			f.Run = f.cut(r.Start, r.End())
			s.flat = append(s.flat, f)
		}
	}
}

// runs returns how many runs memory is, without references to parents.
func (s *Snapshot) runs() int {
	if s.parent == nil {
		return len(s.p.runs)
	}
	return len(s.flat)
}

// run returns one of them.
func (s *Snapshot) run(i int) flatRun {
	if s.parent == nil {
		return flatRun{s.p.runs[i], s, i}
	}
	return s.flat[i]
}

// find returns the place of the one that holds a page, or -1 when it is not RAM.
func (s *Snapshot) find(gfn memory.GFN) int {
	if s.parent == nil {
		return s.p.find(gfn)
	}
	return findRun(len(s.flat), func(i int) Run { return s.flat[i].Run }, gfn)
}

// runOf returns the one that holds a page, if it is RAM.
func (s *Snapshot) runOf(gfn memory.GFN) (flatRun, bool) {
	i := s.find(gfn)
	if i < 0 {
		return flatRun{}, false
	}
	return s.run(i), true
}

// resolve returns what a page of RAM is, a run of one that is Zero, Block or
// Unique.
func (s *Snapshot) resolve(gfn memory.GFN) (flatRun, bool) {
	f, ok := s.runOf(gfn)
	if !ok {
		return flatRun{}, false
	}
	f.Run = f.cut(gfn, gfn+1)
	if f.Kind == Page {
		// What it refers to is no Page run of src, and so one of an ancestor of
		// src at the most: this ends.
		other, ok := f.src.resolve(memory.GFN(f.Number))
		other.Start = gfn
		return other, ok
	}
	return f, true
}

// holds reports whether the snapshot stores these bytes as a page.
func (s *Snapshot) holds(gfn memory.GFN, page []byte) bool {
	f, ok := s.resolve(gfn)
	if !ok || f.Kind != Unique {
		return false
	}
	held, err := f.src.p.slotDigest(f.Number)
	return err == nil && held == pageDigest(f.src.p.seed, page)
}
