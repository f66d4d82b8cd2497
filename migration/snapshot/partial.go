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
	manifestName = "manifest.json"
	pageMapName  = "pagemap"
	pagesName    = "pages"
	sectionsName = "sections"
	// WorkingSet is the file for what the first restore touched. It is not
	// covered by the manifest.
	WorkingSet = "workingset"
)

var fileNames = []string{manifestName, pageMapName, pagesName, sectionsName, WorkingSet}

// partial is a folder that becomes a snapshot when it is renamed. Its lock
// tells a writer that lives from the debris of one that does not: it goes with
// the process, whatever number that had.
type partial struct {
	path, temporary string
	dir             *os.File // locked
}

// NewTarget returns the target that makes the folder path appear. It removes
// what writers that died left of it.
func NewTarget(path string) (Target, error) {
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
	p := &partial{path: path, temporary: filepath.Join(filepath.Dir(path), fmt.Sprintf(".%s.partial-%d", filepath.Base(path), os.Getpid()))}
	if err := os.Mkdir(p.temporary, 0o700); err != nil {
		if errors.Is(err, fs.ErrExist) {
			err = ErrBusy
		}
		return nil, writeError(fmt.Errorf("snapshot %s: %w", path, err))
	}
	if p.dir, err = lockDir(p.temporary); err == nil {
		err = os.Mkdir(filepath.Join(p.temporary, sectionsName), 0o700)
	}
	if err != nil {
		return nil, errors.Join(writeError(fmt.Errorf("snapshot %s: %w", path, err)), p.Abort())
	}
	return p, nil
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

func (p *partial) Create(name string) (*os.File, error) {
	return os.OpenFile(filepath.Join(p.temporary, filepath.FromSlash(name)), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
}

func (p *partial) Commit() error {
	for _, dir := range []string{filepath.Join(p.temporary, sectionsName), p.temporary} {
		if err := syncDir(dir); err != nil {
			return err
		}
	}
	err := unix.Renameat2(unix.AT_FDCWD, p.temporary, unix.AT_FDCWD, p.path, unix.RENAME_NOREPLACE)
	if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS) {
		// The file system cannot; without, a folder replaces only an empty one.
		err = os.Rename(p.temporary, p.path)
	}
	if errors.Is(err, fs.ErrExist) {
		err = ErrExists
	}
	if err != nil {
		return fmt.Errorf("give it its name: %w", err)
	}
	p.temporary = ""
	return errors.Join(p.dir.Close(), syncDir(filepath.Dir(p.path)))
}

func (p *partial) Abort() error {
	if p.temporary == "" {
		return nil
	}
	err := os.RemoveAll(p.temporary)
	p.temporary = ""
	if p.dir != nil {
		err = errors.Join(err, p.dir.Close())
	}
	return err
}

// syncDir makes the names in a folder last.
func syncDir(path string) error {
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

// onlyOurs fails when a folder holds what no snapshot does.
func onlyOurs(path string) error {
	entries, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !slices.Contains(fileNames, e.Name()) {
			return fmt.Errorf("%s holds %s, which is of no snapshot: remove it by hand", path, e.Name())
		}
	}
	return nil
}
