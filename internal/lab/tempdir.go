package lab

import (
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// tempDir is a folder that this process holds locked, so that others can tell
// it from one whose owner was killed.
type tempDir struct {
	path string
	lock *os.File
}

const lockName = "lock"

// newTempDir makes a folder below parent and sweeps the ones that nobody holds.
func newTempDir(parent string) (*tempDir, error) {
	if err := os.MkdirAll(parent, 0o700); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	// The sweep and the making exclude each other, or a folder could be swept
	// between its making and its locking.
	all, err := lockFile(filepath.Join(parent, lockName), unix.LOCK_EX)
	if err != nil {
		return nil, err
	}
	defer func() { _ = all.Close() }()
	sweep(parent)
	path, err := os.MkdirTemp(parent, "run-")
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	lock, err := lockFile(filepath.Join(path, lockName), unix.LOCK_EX)
	if err != nil {
		_ = os.RemoveAll(path)
		return nil, err
	}
	return &tempDir{path: path, lock: lock}, nil
}

func (d *tempDir) join(elem ...string) string {
	return filepath.Join(append([]string{d.path}, elem...)...)
}

// remove deletes the folder.
func (d *tempDir) remove() error {
	err := os.RemoveAll(d.path)
	_ = d.lock.Close()
	return err
}

// sweep deletes folders whose owners are gone.
func sweep(parent string) {
	dirs, err := filepath.Glob(filepath.Join(parent, "run-*"))
	if err != nil {
		return
	}
	for _, dir := range dirs {
		f, err := lockFile(filepath.Join(dir, lockName), unix.LOCK_EX|unix.LOCK_NB)
		if err != nil {
			continue
		}
		_ = os.RemoveAll(dir)
		_ = f.Close()
	}
}

func lockFile(path string, how int) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), how); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lab: lock %s: %w", path, err)
	}
	return f, nil
}
