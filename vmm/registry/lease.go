package registry

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/vmm/config"
)

// State is what a machine was started with. What changes while it runs is
// asked from its API.
type State struct {
	Name    string    `json:"name"`
	PID     int       `json:"pid"`
	Started time.Time `json:"started"`
	CPUs    int       `json:"cpus"`
	Memory  uint64    `json:"memory_bytes"`
	Kernel  string    `json:"kernel"`
	Log     string    `json:"log"`
	// Disks are those that the machine began with, in their order.
	Disks []Disk `json:"disks,omitempty"`
	// Incoming: it comes from another host, and answers only when it is here.
	Incoming bool `json:"incoming,omitempty"`
}

// Disk is a disk of a machine.
type Disk struct {
	Path     string       `json:"path"`
	Format   chain.Format `json:"format,omitempty"` // as it was given
	ReadOnly bool         `json:"readonly,omitempty"`
	// Temporary: the file has no name any more and goes with the machine.
	Temporary bool `json:"temporary,omitempty"`
}

// ExitRecord is how a machine ended.
type ExitRecord struct {
	Time   time.Time `json:"time"`
	Reason string    `json:"reason"`
	Code   int       `json:"code"` // exit code of the machine's process
	Error  string    `json:"error,omitempty"`
	// Where is where a machine went that has migrated.
	Where string `json:"where,omitempty"`
}

// Lease is the right to a name, held by the machine's own process. All of its
// files are in Dir.
type Lease struct {
	Name string
	Dir  string
	// StateDir keeps the logs; it outlives the machine.
	StateDir string
	lock     *os.File
	// suffix is of the files of a name that was adopted and not taken over yet.
	suffix string
}

// maxNumber bounds the search for a free name vmN.
const maxNumber = 10_000

// Acquire takes the name for this process and makes its folders. An empty name
// takes the first free one of vm1, vm2 and so on. It fails with [ErrInUse] if a
// machine of that name runs.
func (r *Registry) Acquire(name string) (*Lease, error) {
	if name != "" && !config.ValidName(name) {
		return nil, fmt.Errorf("%q cannot be a machine's name", name)
	}
	unlock, err := r.lockRoot()
	if err != nil {
		return nil, err
	}
	defer unlock()
	if name != "" {
		return r.acquire(name)
	}
	for i := 1; i <= maxNumber; i++ {
		l, err := r.acquire("vm" + strconv.Itoa(i))
		if !errors.Is(err, ErrInUse) {
			return l, err
		}
	}
	return nil, fmt.Errorf("%d machines run already: %w", maxNumber, ErrInUse)
}

// acquire takes one name. Preconditions: the root lock is held.
func (r *Registry) acquire(name string) (*Lease, error) {
	dir := filepath.Join(r.run, name)
	for _, socket := range []string{apiName, consoleName, opsName} {
		if path := filepath.Join(dir, socket); len(path) > maxSocketBytes {
			return nil, fmt.Errorf("socket path %s is longer than %d bytes: use a shorter name or a shorter XDG_RUNTIME_DIR", path, maxSocketBytes)
		}
	}
	if vm, alive := r.probe(name); alive {
		return nil, fmt.Errorf("%s (pid %d): %w: choose another name, or end it with 'ditto stop %s'", name, vm.PID, ErrInUse, name)
	}
	l := &Lease{Name: name, Dir: dir, StateDir: r.StateDir(name)}
	if err := os.MkdirAll(l.StateDir, 0o700); err != nil {
		return nil, fmt.Errorf("state directory: %w", err)
	}
	if err := ensurePrivate(dir, os.Getuid()); err != nil {
		return nil, err
	}
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	if err := flock(lock, unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = lock.Close()
		return nil, fmt.Errorf("lock %s: %w", name, err)
	}
	l.lock = lock
	if err := l.write(pidName, []byte(strconv.Itoa(os.Getpid())+"\n")); err != nil {
		return nil, errors.Join(err, l.Release())
	}
	return l, nil
}

// APISocket returns the path of the control socket.
func (l *Lease) APISocket() string { return filepath.Join(l.Dir, apiName+l.suffix) }

// ConsoleSocket returns the path of the console socket.
func (l *Lease) ConsoleSocket() string { return filepath.Join(l.Dir, consoleName+l.suffix) }

// OpsSocket returns the path of the socket for operations.
func (l *Lease) OpsSocket() string { return filepath.Join(l.Dir, opsName+l.suffix) }

// LogPath returns the path of the console log.
func (l *Lease) LogPath() string { return filepath.Join(l.StateDir, logName) }

// Publish writes what the machine was started with, for others to list.
func (l *Lease) Publish(s State) error {
	s.Name, s.PID, s.Log = l.Name, os.Getpid(), l.LogPath()
	data, err := json.Marshal(s)
	if err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	return l.write(stateName, append(data, '\n'))
}

// write replaces a file of the folder in one step.
func (l *Lease) write(name string, data []byte) error {
	path := filepath.Join(l.Dir, name)
	if err := os.WriteFile(path+".new", data, 0o600); err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		return fmt.Errorf("publish %s: %w", l.Name, err)
	}
	return nil
}

// OpenExit opens the exit record for [WriteExit], emptying it: opened early,
// it can be written when the process may no longer open files.
func (l *Lease) OpenExit() (*os.File, error) {
	f, err := l.KeepExit()
	if err != nil {
		return nil, err
	}
	if err := f.Truncate(0); err != nil {
		return nil, errors.Join(fmt.Errorf("exit record: %w", err), f.Close())
	}
	return f, nil
}

// KeepExit is OpenExit for a machine that may never run: how the last one of its
// name ended stays until the file is truncated.
func (l *Lease) KeepExit() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(l.StateDir, exitName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("exit record: %w", err)
	}
	return f, nil
}

// WriteExit writes how the machine ended to a file from [Lease.OpenExit].
func WriteExit(f *os.File, e ExitRecord) error {
	data, err := json.Marshal(e)
	if err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	if err := f.Truncate(0); err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	if _, err := f.WriteAt(append(data, '\n'), 0); err != nil {
		return fmt.Errorf("exit record: %w", err)
	}
	return nil
}

// Release gives the name back and removes the folder. The state directory
// stays.
func (l *Lease) Release() error {
	if l.lock == nil {
		return nil
	}
	if l.suffix != "" {
		return l.forsake()
	}
	sweep(l.Dir)
	err := l.lock.Close()
	l.lock = nil
	return err
}
