package registry

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/adrg/xdg"
	"golang.org/x/sys/unix"

	"ditto.vm/vmm/config"
)

// Names inside the folders.
const (
	rootLockName   = ".lock"
	lockName       = "lock"
	pidName        = "pid"
	stateName      = "state.json"
	apiName        = "api.sock"
	consoleName    = "console.sock"
	opsName        = "ops.sock"
	logName        = "console.log"
	exitName       = "exit.json"
	maxSocketBytes = 107 // sun_path less the NUL
)

// ErrInUse is wrapped when a machine of that name runs.
var ErrInUse = errors.New("a machine of that name is running")

// ErrNotRunning is wrapped when no machine of that name runs.
var ErrNotRunning = errors.New("no machine of that name is running")

// Registry is the run directory and the state directory of one user.
type Registry struct {
	run   string // has one folder a running machine
	state string // has one folder a machine that ever ran
}

// Open returns the user's registry and makes its run directory.
func Open() (*Registry, error) {
	run, err := findRunDir(os.Getuid(), []string{xdg.RuntimeDir, fmt.Sprintf("/run/user/%d", os.Getuid())}, "/tmp")
	if err != nil {
		return nil, err
	}
	return &Registry{run: run, state: filepath.Join(xdg.StateHome, "ditto")}, nil
}

// OpenAt returns a registry with the given directories, which it makes.
func OpenAt(run, state string) (*Registry, error) {
	if err := ensurePrivate(run, os.Getuid()); err != nil {
		return nil, err
	}
	return &Registry{run: run, state: state}, nil
}

// findRunDir takes the first base that belongs to uid and that no one else may
// write to, or else a folder of its own in tmp, whose name others could have
// taken and which is therefore checked.
func findRunDir(uid int, bases []string, tmp string) (string, error) {
	for _, base := range bases {
		var st unix.Stat_t
		if base == "" || unix.Stat(base, &st) != nil {
			continue
		}
		if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != uid || st.Mode&0o022 != 0 {
			continue
		}
		dir := filepath.Join(base, "ditto")
		return dir, ensurePrivate(dir, uid)
	}
	dir := filepath.Join(tmp, fmt.Sprintf("ditto-%d", uid))
	return dir, ensurePrivate(dir, uid)
}

// ensurePrivate makes dir with mode 0700, or checks that it is a folder of uid
// that nobody else can enter.
func ensurePrivate(dir string, uid int) error {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("run directory: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return fmt.Errorf("run directory %s: %w", dir, err)
	}
	switch {
	case st.Mode&unix.S_IFMT != unix.S_IFDIR:
		return fmt.Errorf("run directory %s is not a directory: remove it, or set XDG_RUNTIME_DIR", dir)
	case int(st.Uid) != uid:
		return fmt.Errorf("run directory %s belongs to user %d: set XDG_RUNTIME_DIR to a directory of yours", dir, st.Uid)
	case st.Mode&0o077 != 0:
		return fmt.Errorf("run directory %s has mode %#o and others may look into it: chmod 700 it", dir, st.Mode&0o777)
	}
	return nil
}

// RunDir returns the folder that holds one folder a running machine.
func (r *Registry) RunDir() string { return r.run }

// StateDir returns the folder that keeps the logs of the machine name. It may
// not exist.
func (r *Registry) StateDir(name string) string { return filepath.Join(r.state, name) }

// LogPath returns the console log of the machine name, running or not.
func (r *Registry) LogPath(name string) string { return filepath.Join(r.StateDir(name), logName) }

// List returns the running machines by name, and sweeps what dead ones left.
func (r *Registry) List() ([]VM, error) {
	unlock, err := r.lockRoot()
	if err != nil {
		return nil, err
	}
	defer unlock()
	entries, err := os.ReadDir(r.run)
	if err != nil {
		return nil, fmt.Errorf("list machines: %w", err)
	}
	var vms []VM
	for _, e := range entries {
		if !e.IsDir() || !config.ValidName(e.Name()) {
			continue
		}
		if vm, alive := r.probe(e.Name()); alive {
			vms = append(vms, vm)
		}
	}
	slices.SortFunc(vms, func(a, b VM) int { return strings.Compare(a.Name, b.Name) })
	return vms, nil
}

// Find returns the running machine name, or [ErrNotRunning].
func (r *Registry) Find(name string) (VM, error) {
	if !config.ValidName(name) {
		return VM{}, fmt.Errorf("%q is not a machine's name: %w", name, ErrNotRunning)
	}
	unlock, err := r.lockRoot()
	if err != nil {
		return VM{}, err
	}
	defer unlock()
	vm, alive := r.probe(name)
	if !alive {
		return VM{}, fmt.Errorf("%s: %w", name, ErrNotRunning)
	}
	return vm, nil
}

// lockRoot keeps starts and sweeps apart, so that a sweep that tries a lock is
// not taken for a machine that holds it. It is held for microseconds.
func (r *Registry) lockRoot() (unlock func(), err error) {
	f, err := os.OpenFile(filepath.Join(r.run, rootLockName), os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, fmt.Errorf("run directory: %w", err)
	}
	if err := flock(f, unix.LOCK_EX); err != nil {
		_ = f.Close()
		return nil, fmt.Errorf("lock the run directory: %w", err)
	}
	return func() { _ = f.Close() }, nil
}

// probe tells whether the machine name lives, and sweeps its folder if not.
// Preconditions: the root lock is held.
func (r *Registry) probe(name string) (VM, bool) {
	dir := filepath.Join(r.run, name)
	lock, err := os.OpenFile(filepath.Join(dir, lockName), os.O_RDWR|unix.O_NOFOLLOW, 0)
	switch {
	case errors.Is(err, os.ErrNotExist):
		sweep(dir)
		return VM{}, false
	case err != nil:
		return VM{}, false
	}
	defer lock.Close()
	if flock(lock, unix.LOCK_EX|unix.LOCK_NB) == nil {
		sweep(dir)
		return VM{}, false
	}
	return readVM(name, dir), true
}

// sweep removes the folder of a machine that is gone. Only regular files and
// sockets directly inside it exist; anything else makes it stay.
func sweep(dir string) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return
	}
	// The lock goes last: a folder without one is stale for everybody.
	for _, e := range entries {
		if e.Name() != lockName {
			_ = os.Remove(filepath.Join(dir, e.Name()))
		}
	}
	_ = os.Remove(filepath.Join(dir, lockName))
	_ = os.Remove(dir)
}

func flock(f *os.File, how int) error {
	for {
		err := unix.Flock(int(f.Fd()), how)
		if !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

// readPID returns the pid in the file at path, or 0.
func readPID(path string) int {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil || pid <= 0 {
		return 0
	}
	return pid
}
