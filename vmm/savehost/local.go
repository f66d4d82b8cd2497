package savehost

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
)

// Options of a [Local].
type Options struct {
	// Parent is the folder of the parent, "" for none.
	Parent string
	// Machine tells the process of the machine from any other, also later ones of
	// the same name.
	Machine string
	// Check refuses disks that are not the machine's. Nil allows all.
	Check func(OverlayRequest) error
}

// Local is a [Host] with the rights of this process.
type Local struct {
	snapshot.Target
	path    string // of the snapshot
	machine string
	check   func(OverlayRequest) error
	parents map[string]string // folders by what the machine calls them
	frozen  map[int]*frozen   // by disk
	whole   bool              // the snapshot has its name
}

// frozen is a disk that was frozen for the save.
type frozen struct {
	below   string
	mode    fs.FileMode // of below, before
	chmod   bool        // it was changed
	overlay string      // "" for none
	stamp   fs.FileInfo // of the overlay, when it was made
	note    string      // path of what tells of it, if this process is killed
}

var _ Host = (*Local)(nil)

// NewLocal begins a save into the folder path, which must not exist yet.
func NewLocal(path string, o Options) (*Local, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	parents, err := ancestors(o.Parent)
	if err != nil {
		return nil, err
	}
	target, err := snapshot.NewTarget(path)
	if err != nil {
		return nil, err
	}
	return &Local{Target: target, path: path, machine: o.Machine, check: o.Check, parents: parents, frozen: make(map[int]*frozen)}, nil
}

// ancestors finds the folders of a snapshot and its ancestors. Where one is not
// where its child says, the machine looks for it there all the same.
func ancestors(parent string) (map[string]string, error) {
	if parent == "" {
		return nil, nil
	}
	s, err := snapshot.Open(parent, snapshot.OpenOptions{})
	if err != nil {
		return nil, err
	}
	defer s.Close()
	found := make(map[string]string)
	called := s.Dir()
	for at := s; ; at = at.Parent() {
		found[called] = at.Dir()
		p := at.Manifest().Parent
		if p == nil {
			return found, nil
		}
		called = ParentDir(called, *p)
	}
}

// ParentDir is where the snapshot in dir says that its parent is.
func ParentDir(dir string, p snapshot.Parent) string {
	if filepath.IsAbs(p.Path) {
		return filepath.Clean(p.Path)
	}
	return filepath.Join(dir, p.Path)
}

// OpenSnapshotFile implements [Host].
func (l *Local) OpenSnapshotFile(dir, name string) (*os.File, error) {
	at, ok := l.parents[filepath.Clean(dir)]
	if !ok {
		return nil, fmt.Errorf("%w: %s is not the parent or an ancestor of it", snapshot.ErrParent, dir)
	}
	root, err := os.OpenRoot(at)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	// O_NONBLOCK: a FIFO of that name must not hang.
	return root.OpenFile(filepath.FromSlash(name), os.O_RDONLY|unix.O_NONBLOCK, 0)
}

// Overlay implements [Host]: beside the disk as STEM.SNAPSHOT.qcow2, numbered
// if there is one already.
func (l *Local) Overlay(ctx context.Context, r OverlayRequest) (Overlay, error) {
	none := Overlay{FD: -1, Buffered: -1}
	if ctx.Err() != nil {
		return none, context.Cause(ctx)
	}
	if _, ok := l.frozen[r.Disk]; ok {
		return none, fmt.Errorf("disk %d is frozen already", r.Disk)
	}
	if l.check != nil {
		if err := l.check(r); err != nil {
			return none, err
		}
	}
	f, err := l.freeze(r.Below)
	if err != nil {
		return none, err
	}
	l.frozen[r.Disk] = f
	if r.FreezeOnly {
		return none, nil
	}
	made, err := l.overlay(f, r)
	if err != nil {
		return none, errors.Join(err, l.DropOverlay(r.Disk))
	}
	return made, nil
}

// beside is the folder for what belongs to a disk: its own, or where the snapshot
// is, since beside a device there is no room.
func (l *Local) beside(disk string) string {
	if info, err := os.Stat(disk); err == nil && !info.Mode().IsRegular() {
		return filepath.Dir(l.path)
	}
	return filepath.Dir(disk)
}

// freeze takes all write permissions from a file, and leaves a note of it. A
// device has none to take: who opens it is a matter of locks.
func (l *Local) freeze(path string) (*frozen, error) {
	note := noteOf(l.beside(path), path)
	if err := redeem(note, path, l.machine); err != nil {
		return nil, fmt.Errorf("clean up after a save that was killed: %w", err)
	}
	info, err := os.Stat(path)
	if err != nil {
		return nil, fmt.Errorf("freeze disk: %w", err)
	}
	f := &frozen{below: path, note: note, mode: info.Mode().Perm(), chmod: info.Mode().IsRegular() && info.Mode()&0o222 != 0}
	l.told(f).write(note)
	if !f.chmod {
		return f, nil
	}
	if err := os.Chmod(path, f.mode&^0o222); err != nil {
		_ = os.Remove(note) // nothing was done
		return nil, fmt.Errorf("freeze disk %s: %w: only its owner can; put an overlay on it with 'ditto image overlay' and run that", path, err)
	}
	// A snapshot that is whole after a power cut needs it frozen.
	if err := syncFile(path); err != nil {
		return nil, errors.Join(fmt.Errorf("freeze disk: %w", err), f.thaw(), f.forget())
	}
	return f, nil
}

// told is the note of a disk while it has no overlay.
func (l *Local) told(f *frozen) note { return note{Machine: l.machine, Mode: f.mode} }

// forget removes the note: what was done for the save is undone, or stays.
func (f *frozen) forget() error {
	if err := os.Remove(f.note); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// syncFile makes a file's contents and permissions last.
func syncFile(path string) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(file.Sync(), file.Close())
}

// thaw undoes freeze.
func (f *frozen) thaw() error {
	if !f.chmod {
		return nil
	}
	f.chmod = false
	return os.Chmod(f.below, f.mode)
}

// mostNumbers bounds the names that are tried for one overlay.
const mostNumbers = 1000

func (l *Local) overlay(f *frozen, r OverlayRequest) (Overlay, error) {
	name := filepath.Join(l.beside(r.Below), stem(r.Below, r.Format, 0)+"."+filepath.Base(l.path))
	for n := 1; ; n++ {
		path := name + ".qcow2"
		if n > 1 {
			path = fmt.Sprintf("%s-%d.qcow2", name, n)
		}
		err := chain.CreateOverlay(path, r.Below, r.Format, r.Size)
		if errors.Is(err, fs.ErrExist) && n < mostNumbers {
			continue
		}
		if err != nil {
			return Overlay{}, fmt.Errorf("overlay of disk %d: %w", r.Disk, err)
		}
		f.overlay = path
		if n, err := l.told(f).identify(path); err == nil {
			n.write(f.note)
		}
		if f.stamp, err = os.Stat(path); err != nil {
			return Overlay{}, err
		}
		return open(path, r.Direct)
	}
}

// stem is how the overlays of an image begin: like those that the image itself
// is one of, or else like the image without its extension.
func stem(path string, format chain.Format, depth int) string {
	name := filepath.Base(path)
	name = strings.TrimSuffix(name, filepath.Ext(name))
	if format != chain.Qcow2 || depth == chain.MaxDepth {
		return name
	}
	below, format, err := chain.Backing(path)
	if err != nil || below == "" {
		return name // whoever opens it says what is wrong
	}
	if s := stem(below, format, depth+1); strings.HasPrefix(name, s+".") {
		return s
	}
	return name
}

// open opens an overlay as often as it is wanted.
func open(path string, direct bool) (Overlay, error) {
	o := Overlay{Path: path, FD: -1, Buffered: -1}
	flags := 0
	if direct {
		flags = unix.O_DIRECT
	}
	var err error
	if o.FD, err = openFile(path, flags); err == nil && direct {
		if o.Buffered, err = openFile(path, 0); err != nil {
			_ = unix.Close(o.FD) // nothing was written
		}
	}
	if err != nil {
		return Overlay{}, fmt.Errorf("overlay %s: %w", path, err)
	}
	return o, nil
}

func openFile(path string, flags int) (int, error) {
	for {
		fd, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC|flags, 0)
		if !errors.Is(err, unix.EINTR) {
			return fd, err
		}
	}
}

// Commit implements [Host]. From then on the snapshot needs the disks as they are.
func (l *Local) Commit() error {
	// The machine goes on in the overlays if it does not hear what comes of this.
	for _, f := range l.frozen {
		if err := f.forget(); err != nil {
			return err
		}
	}
	err := l.Target.Commit()
	l.whole = err == nil
	return err
}

// DropOverlay implements [Host].
func (l *Local) DropOverlay(disk int) error {
	f, ok := l.frozen[disk]
	if !ok {
		return nil
	}
	if l.whole {
		return fmt.Errorf("disk %s stays frozen: %s needs it", f.below, l.path)
	}
	delete(l.frozen, disk)
	err := f.thaw()
	if f.overlay != "" {
		err = errors.Join(err, os.Remove(f.overlay))
	}
	return errors.Join(err, f.forget())
}

// Abandon undoes what was done for a machine that is gone. If the snapshot is
// whole already it stays, and so do the disks that it needs and the overlays.
// Otherwise only an overlay that was written to stays, with the disk below it
// frozen: it holds what the machine wrote last. The paths of overlays that stay
// are returned.
func (l *Local) Abandon() (whole bool, kept []string, err error) {
	errs := []error{l.Abort()}
	for disk, f := range l.frozen {
		if f.overlay != "" && (l.whole || f.written()) {
			kept = append(kept, f.overlay)
			errs = append(errs, f.forget())
		} else if !l.whole {
			errs = append(errs, l.DropOverlay(disk))
		}
	}
	slices.Sort(kept)
	return l.whole, kept, errors.Join(errs...)
}

// written tells whether the overlay is not as it was made.
func (f *frozen) written() bool {
	now, err := os.Stat(f.overlay)
	return err != nil || !now.ModTime().Equal(f.stamp.ModTime()) || now.Size() != f.stamp.Size()
}
