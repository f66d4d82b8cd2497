package savehost

import (
	"context"
	"errors"
	"os"

	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
)

// ErrInDoubt is wrapped by an error of Commit when it is not known whether the
// snapshot is complete: who was asked is gone. What it may need must not change.
var ErrInDoubt = errors.New("it is not known whether the snapshot is complete")

// Host does for a save what the machine's process has no right to. Its methods
// are called by one goroutine at a time.
type Host interface {
	// The files of the snapshot.
	snapshot.Target
	// Overlay freezes the file of a disk's top and makes an empty overlay on it,
	// open as [chain.Chain.StackFD] wants it.
	Overlay(ctx context.Context, r OverlayRequest) (Overlay, error)
	// DropOverlay removes the overlay of a disk, which is not in use any more,
	// and lets the file below be written again.
	DropOverlay(disk int) error
	// OpenSnapshotFile opens a file of the parent, or of one of its ancestors,
	// for reading, by its name in the format. dir is what the child says, or for
	// the parent itself [ditto.vm/vmm.SaveOptions].
	OpenSnapshotFile(dir, name string) (*os.File, error)
}

// OverlayRequest says which overlay is wanted.
type OverlayRequest struct {
	// Disk numbers the machine's disks, from 0.
	Disk int
	// Below is the path of the image that is frozen, Format its format.
	Below  string
	Format chain.Format
	// Size of the disk in bytes.
	Size int64
	// Direct wants a second descriptor: the first is open with O_DIRECT.
	Direct bool
	// FreezeOnly makes no overlay: the machine ends with the save.
	FreezeOnly bool
}

// Overlay is an overlay that is open for reading and writing. The descriptors
// are the caller's.
type Overlay struct {
	Path string
	// FD is -1 if only freezing was asked for, Buffered is -1 unless Direct.
	FD, Buffered int
}
