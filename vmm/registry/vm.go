package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// VM is a running machine, seen by another process.
type VM struct {
	State
	// Dir is the machine's folder in the run directory.
	Dir string
}

// readVM reads what the machine published. A machine that is only starting has
// not published its state yet; the pid is then all there is.
func readVM(name, dir string) VM {
	vm := VM{Dir: dir}
	if data, err := os.ReadFile(filepath.Join(dir, stateName)); err == nil {
		_ = json.Unmarshal(data, &vm.State)
	}
	vm.Name = name
	if vm.PID <= 0 {
		vm.PID = readPID(filepath.Join(dir, pidName))
	}
	return vm
}

// APISocket returns the path of the control socket.
func (v VM) APISocket() string { return filepath.Join(v.Dir, apiName) }

// ConsoleSocket returns the path of the console socket.
func (v VM) ConsoleSocket() string { return filepath.Join(v.Dir, consoleName) }

// OpsSocket returns the path of the socket for operations.
func (v VM) OpsSocket() string { return filepath.Join(v.Dir, opsName) }

// waitStep is how often Wait looks whether the name is free or its context has
// ended.
const waitStep = 100 * time.Millisecond

// Wait returns when the machine is gone: when its process has ended, or has
// given the name back. It fails with the context's error.
func (r *Registry) Wait(ctx context.Context, vm VM) error {
	fd, err := unix.PidfdOpen(vm.PID, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("wait for %s: %w", vm.Name, err)
	}
	defer unix.Close(fd)
	for {
		// The pid may have been reused before it was opened; the name then is
		// free, or is held by another process.
		if now, err := r.Find(vm.Name); err != nil || now.PID != vm.PID {
			return nil
		}
		poll := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(poll, int(waitStep.Milliseconds()))
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return fmt.Errorf("wait for %s: %w", vm.Name, err)
		case n > 0:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("wait for %s: %w", vm.Name, ctx.Err())
		}
	}
}

// LastExit returns how the machine name ended the last time. It fails with
// os.ErrNotExist if it never did.
func (r *Registry) LastExit(name string) (ExitRecord, error) {
	data, err := os.ReadFile(filepath.Join(r.StateDir(name), exitName))
	if err != nil {
		return ExitRecord{}, fmt.Errorf("exit record: %w", err)
	}
	var e ExitRecord
	if len(data) == 0 {
		return ExitRecord{}, fmt.Errorf("exit record of %s is empty: %w", name, os.ErrNotExist)
	}
	if err := json.Unmarshal(data, &e); err != nil {
		return ExitRecord{}, fmt.Errorf("exit record of %s: %w", name, err)
	}
	return e, nil
}

// Logged returns the names of all machines that have a console log.
func (r *Registry) Logged() []string {
	paths, err := filepath.Glob(filepath.Join(r.state, "*", logName))
	if err != nil {
		return nil
	}
	names := make([]string, 0, len(paths))
	for _, path := range paths {
		names = append(names, filepath.Base(filepath.Dir(path)))
	}
	return names
}
