package vmproc

import (
	"context"
	"errors"
	"fmt"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/vmm"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/registry"
)

// BuildVM is the [Builder] of real machines.
func BuildVM(ctx context.Context, cfg config.Config, s Surroundings) (Machine, error) {
	m, err := vmm.New(ctx, cfg, vmm.Options{Log: s.Log, Console: s.Console, NetLog: &lineLog{log: s.Log}, Version: s.Version})
	if err != nil {
		return nil, err
	}
	return newVM(m, s, disksOf(cfg, false)), nil
}

// vm is a *vmm.VM and what its process knows about it.
type vm struct {
	*vmm.VM
	*remotemigrate.Departure
	surroundings Surroundings
	disks        []registry.Disk
}

func newVM(m *vmm.VM, s Surroundings, disks []registry.Disk) *vm {
	return &vm{
		VM: m, surroundings: s, disks: disks,
		Departure: remotemigrate.NewDeparture(m.MigrationSource, s.Log),
	}
}

// Pause stops the guest, unless a migration decides about that.
func (v *vm) Pause(ctx context.Context) error {
	if err := v.MayRun(); err != nil {
		return fmt.Errorf("pause: %w", err)
	}
	return v.VM.Pause(ctx)
}

// Resume lets the guest run on, unless a migration decides about that.
func (v *vm) Resume(ctx context.Context) error {
	if err := v.MayRun(); err != nil {
		return fmt.Errorf("resume: %w", err)
	}
	return v.VM.Resume(ctx)
}

// HandOver returns what another process of this host goes on with.
func (v *vm) HandOver() (*remotemigrate.Belongings, error) {
	for i, d := range v.disks {
		if d.Temporary {
			return nil, fmt.Errorf("disk %d, %s, has no name any more, and no other process can open it: the machine stays with this ditto until it ends", i, d.Path)
		}
	}
	h, err := v.VM.HandOver()
	if err != nil {
		return nil, err
	}
	return &remotemigrate.Belongings{Memory: h.Memory}, nil
}

// Disks are those that the machine began with.
func (v *vm) Disks() []registry.Disk { return v.disks }

// Info adds what is the process's to the machine's own.
func (v *vm) Info() api.Info {
	info := v.VM.Info()
	info.Version = v.surroundings.Version
	info.ConsoleLog = v.surroundings.LogPath
	info.Sandboxed = v.surroundings.Sandboxed
	info.Migration = v.Status()
	return info
}

// WriteInput types p on the guest's console. What does not arrive before the
// machine ends has nobody to read it.
func (v *vm) WriteInput(ctx context.Context, p []byte) { _, _ = v.VM.ConsoleInput(ctx, p) }

// Wait returns how the guest ended, with the exit code that stands for it.
func (v *vm) Wait(ctx context.Context) (Exit, error) {
	e, err := v.VM.Wait(ctx)
	if err != nil {
		return Exit{}, err
	}
	out := Exit{Reason: string(e.Reason), Err: e.Err}
	switch e.Reason {
	case vmm.ExitPowerOff, vmm.ExitReboot, vmm.ExitSaved:
		out.Code = exit.OK
	case vmm.ExitMigrated:
		out.Code, out.Where, out.TakenOver = exit.OK, v.Gone(), v.TakenOver()
	case vmm.ExitPanicked:
		out.Code, out.Err = exit.Panicked, errors.New("the guest's kernel panicked")
	case vmm.ExitKilled:
		out.Code = exit.Killed
	case vmm.ExitStatus:
		out.Code = int(e.Status & 0xff)
	default:
		out.Code = exit.GuestError
		if Classify(out.Err) == exit.Net {
			out.Code = exit.Net // it came up after the guest, or not at all
		}
		if out.Err == nil {
			out.Err = fmt.Errorf("the machine ended: %s", e.Reason)
		}
	}
	return out, nil
}
