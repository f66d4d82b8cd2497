package vmproc

import (
	"context"
	"io"
	"log/slog"

	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/lend/remotemigrate"
	"ditto.vm/vmm/lend/remotesave"
	"ditto.vm/vmm/registry"
)

// Machine is a virtual machine as its process sees it.
type Machine interface {
	api.Machine
	// Start lets the guest run.
	Start(ctx context.Context) error
	// Wait returns how the guest ended, when all of it has ended.
	Wait(ctx context.Context) (Exit, error)
	// WriteInput types p on the guest's console. It blocks until the guest has
	// room for it, or ctx ends.
	WriteInput(ctx context.Context, p []byte)
	// Disks are those that the machine began with.
	Disks() []registry.Disk
	// A machine is saved and moved with what a client lends.
	remotesave.Saver
	remotemigrate.Mover
	// HandOver returns what another process of this host goes on with, but for the
	// lock on the name.
	HandOver() (*remotemigrate.Belongings, error)
	Close() error
}

// Exit is how a guest ended.
type Exit struct {
	Reason string // poweroff, reboot, saved, migrated, panic, killed, error, status
	Code   int    // of package exit, or a payload's status
	Err    error  // of reason error
	Where  string // of reason migrated: where it went
	// TakenOver: another process of this host has it, and its name.
	TakenOver bool
}

// Surroundings are what a machine is built with.
type Surroundings struct {
	Log     *slog.Logger
	Console io.Writer
	// Version, LogPath and Sandboxed are reported by the API.
	Version   string
	LogPath   string
	Sandboxed bool
	// Handed is what a machine that arrives had on this host; nil for one of
	// another host.
	Handed *remotemigrate.Belongings
}

// Builder makes a machine from a configuration that names files by path. It
// opens all that the machine needs: the process drops its rights afterwards.
type Builder func(ctx context.Context, cfg config.Config, s Surroundings) (Machine, error)
