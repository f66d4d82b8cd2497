package snapshot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// Entry is a snapshot that was found in a folder.
type Entry struct {
	Path string
	ID   ID
	// Manifest is nil when it cannot be used.
	Manifest *Manifest
	// Err says why not.
	Err error
	// Stored is what the snapshot's files take of the disk, in bytes.
	Stored uint64
}

// maxDepth bounds how deep below a folder snapshots are looked for.
const maxDepth = 8

// List returns the snapshots below a folder, and the folder itself if it is one,
// in the order of their paths. Only manifests are read: see [Open] and
// [Snapshot.Verify] for the rest.
func List(dir string) ([]Entry, error) {
	var all []Entry
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			if path != dir && errors.Is(err, fs.ErrPermission) || path != dir && errors.Is(err, fs.ErrNotExist) {
				return fs.SkipDir
			}
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if path != dir && debris.MatchString(d.Name()) {
			return fs.SkipDir
		}
		if _, err := os.Lstat(filepath.Join(path, ManifestName)); err == nil {
			all = append(all, inspect(path))
			return fs.SkipDir
		}
		if rel, err := filepath.Rel(dir, path); err != nil || rel != "." && strings.Count(rel, string(filepath.Separator))+1 >= maxDepth {
			return fs.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("list snapshots: %w", err)
	}
	return all, nil
}

// inspect reads the manifest of a snapshot.
func inspect(path string) Entry {
	e := Entry{Path: path}
	s := Snapshot{dir: path}
	s.o.complete()
	if err := s.readManifest(); err != nil {
		e.Err = fmt.Errorf("snapshot %s: %w", path, err)
		return e
	}
	e.ID, e.Manifest = s.id, s.m
	e.Err = filepath.WalkDir(path, func(path string, _ fs.DirEntry, err error) error {
		var st unix.Stat_t
		if err == nil {
			err = unix.Lstat(path, &st)
		}
		e.Stored += uint64(st.Blocks) * 512
		return err
	})
	return e
}

// Dependents returns those of the snapshots that add to the one with the
// identity, directly.
func Dependents(all []Entry, id ID) []Entry {
	var found []Entry
	for _, e := range all {
		if e.Manifest != nil && e.Manifest.Parent != nil && e.Manifest.Parent.ID == id {
			found = append(found, e)
		}
	}
	return found
}

// Remove removes the snapshot at path. It refuses, with an error that wraps
// [ErrDependents], when one beside it or below the folders has it as its
// parent. Whatever happens, what is left under the name is whole or nothing.
func Remove(path string, folders ...string) error {
	path, err := filepath.Abs(path)
	if err != nil {
		return err
	}
	doomed := inspect(path)
	if errors.Is(doomed.Err, fs.ErrNotExist) && doomed.Manifest == nil {
		return fmt.Errorf("remove snapshot %s: there is none: %w", path, doomed.Err)
	}
	if doomed.Manifest != nil {
		err = refuse(doomed, append(folders, filepath.Dir(path)))
	} else {
		// One that cannot be read is no use as a parent; but is it one?
		err = onlyFiles(path)
	}
	if err != nil {
		return fmt.Errorf("remove snapshot %s: %w", path, err)
	}
	lock, err := lockDir(path)
	if err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	defer lock.Close()
	dir, name := filepath.Split(path)
	going := filepath.Join(dir, fmt.Sprintf(".%s.removed-%d", name, os.Getpid()))
	if err := os.Rename(path, going); err != nil {
		return fmt.Errorf("remove snapshot: %w", err)
	}
	if err := errors.Join(os.RemoveAll(going), SyncDir(dir)); err != nil {
		return fmt.Errorf("remove snapshot %s: %w", path, err)
	}
	return nil
}

// refuse returns an error when a snapshot in the folders depends on doomed.
func refuse(doomed Entry, folders []string) error {
	var paths []string
	for _, folder := range folders {
		all, err := List(folder)
		if err != nil {
			return err
		}
		for _, e := range Dependents(all, doomed.ID) {
			paths = append(paths, e.Path)
		}
	}
	if len(paths) == 0 {
		return nil
	}
	return fmt.Errorf("%w: %s", ErrDependents, strings.Join(paths, ", "))
}
