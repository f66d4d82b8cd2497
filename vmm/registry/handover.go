package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"ditto.vm/vmm/config"
)

// A name goes from one process to another without a moment in which it is free:
// both hold the same lock, which is one of the open file and not of a process, and
// which ends when the last of them has let go.
//
//	old                            new
//	Acquire
//	Lock ---- descriptor ------->  Adopt      its sockets have names of their own
//	(commit)                       TakeOver   they take the places of the old ones
//	Yield                          Release
//
// If the new one ends before TakeOver nothing has changed. If the old one fails to
// Yield, its end does.

// Lock returns a copy of the lock on the name, for another process to [Registry.Adopt].
func (l *Lease) Lock() (*os.File, error) {
	if l.lock == nil {
		return nil, fmt.Errorf("%s: %w", l.Name, ErrNotRunning)
	}
	fd, err := unix.FcntlInt(l.lock.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("lock of %s: %w", l.Name, err)
	}
	return os.NewFile(uintptr(fd), l.lock.Name()), nil
}

// Adopt shares a name with the process that holds it, by a copy of its lock, which
// the lease owns from now on.
func (r *Registry) Adopt(name string, lock *os.File) (*Lease, error) {
	l := &Lease{
		Name: name, Dir: filepath.Join(r.run, name), StateDir: r.StateDir(name), lock: lock,
		suffix: "." + strconv.Itoa(os.Getpid()),
	}
	if err := l.checkLock(); err != nil {
		return nil, errors.Join(fmt.Errorf("adopt %s: %w", name, err), lock.Close())
	}
	return l, nil
}

// checkLock checks that the lock is that of the name.
func (l *Lease) checkLock() error {
	if !config.ValidName(l.Name) {
		return fmt.Errorf("%q cannot be a machine's name", l.Name)
	}
	if path := filepath.Join(l.Dir, consoleName+l.suffix); len(path) > maxSocketBytes {
		return fmt.Errorf("socket path %s is longer than %d bytes: use a shorter XDG_RUNTIME_DIR", path, maxSocketBytes)
	}
	there, err := os.Lstat(filepath.Join(l.Dir, lockName))
	if err != nil {
		return err
	}
	here, err := l.lock.Stat()
	if err != nil {
		return err
	}
	if !os.SameFile(here, there) {
		return errors.New("the lock is another machine's")
	}
	// It is held by this very open file, so that locking it again changes nothing.
	return flock(l.lock, unix.LOCK_EX|unix.LOCK_NB)
}

// Stage writes what is published as soon as the name is taken over.
func (l *Lease) Stage(s State) error {
	s.Name, s.PID, s.Log = l.Name, os.Getpid(), l.LogPath()
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	if err := os.WriteFile(filepath.Join(l.Dir, pidName+l.suffix), []byte(strconv.Itoa(os.Getpid())+"\n"), 0o600); err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	if err := os.WriteFile(filepath.Join(l.Dir, stateName+l.suffix), append(data, '\n'), 0o600); err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	return nil
}

// handed are the files that have a name of their own until TakeOver. Who looks the
// machine up finds the process by its pid last, when all sockets are its own.
var handed = []string{apiName, consoleName, opsName, pidName, stateName}

// TakeOver makes this the process of the name: each file takes the place of the
// other process's in one step. It needs no right but to rename.
func (l *Lease) TakeOver() error {
	var errs []error
	for _, name := range handed {
		to := filepath.Join(l.Dir, name)
		if err := unix.Renameat(unix.AT_FDCWD, to+l.suffix, unix.AT_FDCWD, to); err != nil {
			errs = append(errs, fmt.Errorf("take over %s: %s: %w", l.Name, name, err))
		}
	}
	l.suffix = ""
	return errors.Join(errs...)
}

// Yield lets go of a name that another process has taken over.
func (l *Lease) Yield() error {
	if l.lock == nil {
		return nil
	}
	err := l.lock.Close()
	l.lock = nil
	return err
}

// forsake removes what an adopted name would have been taken over with.
func (l *Lease) forsake() error {
	for _, name := range handed {
		_ = os.Remove(filepath.Join(l.Dir, name+l.suffix)) // it goes with the folder at the latest
	}
	return l.Yield()
}
