package vmproc

import (
	"errors"

	"golang.org/x/sys/unix"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/guest/boot"
	"ditto.vm/images/disk"
	"ditto.vm/images/kernel"
	"ditto.vm/images/uroot"
	"ditto.vm/internal/netd"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/state"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/kvm"
	"ditto.vm/vmm/registry"
)

// Classify returns the exit code that an error stands for.
func Classify(err error) int {
	var coded *exit.Error
	if errors.As(err, &coded) {
		return coded.Code
	}
	var (
		stateError  *state.Error
		configError *config.Error
		diskError   *disk.Error
		netdError   *netd.StartError
		netError    *vmm.NetError
		cpuError    *vmm.CPUModelError
	)
	switch {
	case err == nil:
		return exit.OK
	case errors.As(err, &configError), errors.As(err, &cpuError):
		return exit.Usage
	case errors.As(err, &diskError):
		return exit.Disk
	case errors.As(err, &netdError), errors.As(err, &netError):
		return exit.Net
	case errors.As(err, &stateError):
		return exit.Snapshot
	}
	for _, known := range []struct {
		err  error
		code int
	}{
		{registry.ErrInUse, exit.NameInUse},
		{registry.ErrNotRunning, exit.NotFound},
		{kvm.ErrNoDevice, exit.NoKVM},
		{kvm.ErrPermission, exit.Permission},
		{vmm.ErrNoLinux, exit.NoLinux},
		{vmm.ErrNoTracker, exit.Tracker},
		{vmm.ErrNoMemory, exit.Memory},
		{boot.ErrMissing, exit.Kernel},
		{boot.ErrNotRegular, exit.Kernel},
		{boot.ErrTruncated, exit.Kernel},
		{boot.ErrNotKernel, exit.Kernel},
		{boot.ErrArchitecture, exit.Kernel},
		{boot.ErrNoPVH, exit.Kernel},
		{boot.ErrNoRoom, exit.Kernel},
		{boot.ErrCmdline, exit.Kernel},
		{kernel.ErrNotCached, exit.Kernel},
		{uroot.ErrNoGo, exit.Kernel},
		{uroot.ErrNoModules, exit.Kernel},
		{unix.ENOMEM, exit.Memory},
		{vmm.ErrOtherMachine, exit.Snapshot},
		{snapshot.ErrFormat, exit.Snapshot},
		{snapshot.ErrVersion, exit.Snapshot},
		{snapshot.ErrLayer, exit.Snapshot},
		{snapshot.ErrParent, exit.Snapshot},
		{snapshot.ErrExists, exit.Snapshot},
		{snapshot.ErrBusy, exit.Snapshot},
		{snapshot.ErrNoSpace, exit.Snapshot},
		{snapshot.ErrDependents, exit.Snapshot},
	} {
		if errors.Is(err, known.err) {
			return known.code
		}
	}
	return exit.Failure
}
