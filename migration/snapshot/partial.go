package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"golang.org/x/sys/unix"
)

// Target is where a [Writer] puts the files of a snapshot.
type Target interface {
	// Create makes a file of the snapshot, which the writer closes. Names are
	// those of the format, with a slash below sections.
	Create(name string) (*os.File, error)
	// Commit makes the snapshot appear under its name, whole and for good. All
	// files are written, synced and closed.
	Commit() error
	// Abort removes everything. After Commit it does nothing.
	Abort() error
}

// Names of the files of a snapshot.
const (
	ManifestName = "manifest.json"
	PageMapName  = "pagemap"
	PagesName    = "pages"
	SectionsName = "sections"
	// WorkingSet is the file for what the first restore touched. It is not
	// covered by the manifest.
	WorkingSet = "workingset"
)

var fileNames = []string{ManifestName, PageMapName, PagesName, SectionsName, WorkingSet}

// Folder is a folder that appears under its name when it is complete. Its lock
// tells a writer that lives from the debris of one that does not: it goes with
// the process, whatever number that had.
type Folder struct {
	path, temporary string
	dir             *os.File // locked
}

// NewFolder begins a folder that is to appear at path. It removes what writers
// that died left of it.
func NewFolder(path string) (*Folder, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return nil, err
	}
	if _, err := os.Lstat(path); err == nil {
		return nil, fmt.Errorf("snapshot %s: %w", path, ErrExists)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("snapshot: %w", err)
	}
	live, err := sweep(filepath.Dir(path), filepath.Base(path))
	if err != nil {
		return nil, fmt.Errorf("snapshot %s: %w", path, err)
	}
	if live > 0 {
		return nil, fmt.Errorf("snapshot %s: %w", path, ErrBusy)
	}
	f := &Folder{path: path, temporary: filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.partial-%d", filepath.Base(path), os.Getpid()))}
	if err := os.Mkdir(f.temporary, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = ErrBusy
		}
		return nil, writeError(fmt.Errorf("snapshot %s: %w", path, err))
	}
	if f.dir, err = lockDir(f.temporary); err != nil {
		return nil, errors.Join(writeError(fmt.Errorf("snapshot %s: %w", path, err)), f.Abort())
	}
	return f, nil
}

// Temporary is where the folder is until Commit.
func (f *Folder) Temporary() string { return f.temporary }

// Commit makes the folder appear under its name. All in it is synced, but its own
// names.
func (f *Folder) Commit() error {
	if err := SyncDir(f.temporary); err != nil {
		return err
	}
	err := unix.Renameat2(unix.AT_FDCWD, f.temporary, unix.AT_FDCWD, f.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// The file system cannot; without, a folder replaces only an empty one.
		err = os.Rename(f.temporary, f.path)
	}
	if errors.Is(err, fs.ErrExist) {
		err = ErrExists
	}
	if err != nil {
		return fmt.Errorf("give it its name: %w", err)
	}
	if err := SyncDir(filepath.Dir(f.path)); err != nil {
		// Whoever hears that it failed goes on as if there was none, and may write
		// what it names.
		if back := os.Rename(f.path, f.temporary); back != nil {
			f.temporary = ""
			err = errors.Join(err, fmt.Errorf("and it has its name: %w", back))
		}
		return err
	}
	f.temporary = ""
	return f.dir.Close()
}

// Abort removes the folder. After Commit it does nothing.
func (f *Folder) Abort() error {
	if f.temporary == "" {
		return nil
	}
	err := os.RemoveAll(f.temporary)
	f.temporary = ""
	if f.dir != nil {
		err = errors.Join(err, f.dir.Close())
	}
	return err
}

// partial is a snapshot that is being written.
type partial struct{ *Folder }

// NewTarget returns the target that makes the folder path appear. It removes
// what writers that died left of it.
func NewTarget(path string) (Target, error) {
	f, err := NewFolder(path)
	if err != nil {
		return nil, err
	}
	if err := os.Mkdir(filepath.Join(f.temporary, SectionsName), 0o700); err != nil {
		return nil, errors.Join(writeError(fmt.Errorf("snapshot %s: %w", path, err)), f.Abort())
	}
	return partial{f}, nil
}

func (p partial) Create(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(p.temporary, filepath.FromSlash(name)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

func (p partial) Commit() error {
	if err := SyncDir(filepath.Join(p.temporary, SectionsName)); err != nil {
		return err
	}
	return p.Folder.Commit()
}

// lockDir opens a folder and locks it. The error wraps [ErrBusy] when another
// has it.
func lockDir(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_DIRECTORY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return nil, err
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = ErrBusy
		}
		return nil, errors.Join(fmt.Errorf("lock %s: %w", path, err), f.Close())
	}
	// Whoever held the lock before may have removed or renamed it.
	if held, err := f.Stat(); err == nil {
		if now, err := os.Lstat(path); err == nil && os.SameFile(held, now) {
			return f, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("lock %s: %w", path, ErrBusy), f.Close())
}

// SyncDir makes the names in a folder last.
func SyncDir(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// debris is what names of snapshots that are being written or removed look
// like.
var debris = regexp.MustCompile(`^\.(.+)\.(partial|removed)-[0-9]+$`)

// Sweep removes what writers and removals that died left in a folder.
func Sweep(dir string) error {
	_, err := sweep(dir, "")
	return err
}

// sweep removes debris in dir, of the snapshot called name or of all, and
// returns how many of these are still alive.
func sweep(dir, name string) (live int, err error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var errs []error
	for _, e := range entries {
		m := debris.FindStringSubmatch(e.Name())
		if m == nil || !e.IsDir() || name != "" && m[1] != name {
			continue
		}
		switch err := sweepOne(filepath.Join(dir, e.Name())); {
		case errors.Is(err, ErrBusy):
			live++
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			errs = append(errs, err)
		}
	}
	return live, errors.Join(errs...)
}

// sweepOne removes a folder that nobody has locked.
func sweepOne(path string) error {
	f, err := lockDir(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := onlyOurs(path); err != nil {
		return err
	}
	return os.RemoveAll(path)
}

// onlyOurs fails when a folder holds what neither a snapshot does nor a folder of
// snapshots and their layers.
func onlyOurs(path string) error {
	return onlyThese(path, func(e fs.DirEntry) bool {
		return slices.Contains(fileNames, e.Name()) || e.IsDir() && (e.Name() == LayersName || onlyFiles(filepath.Join(path, e.Name())) == nil)
	})
}

// onlyFiles fails when a folder holds more than the files of a snapshot.
func onlyFiles(path string) error {
	return onlyThese(path, func(e fs.DirEntry) bool { return slices.Contains(fileNames, e.Name()) })
}

func onlyThese(path string, ours func(fs.DirEntry) bool) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !ours(e) {
			return fmt.Errorf("%s holds %s, which is of no snapshot: remove it by hand", path, e.Name())
		}
	}
	return nil
}
