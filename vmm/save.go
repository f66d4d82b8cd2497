package vmm

import (
	"time"

	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/savehost"
)

// SaveHost does for a save what the machine's process has no right to.
type SaveHost = savehost.Host

// SaveOptions say how to save.
type SaveOptions struct {
	// Parent is the folder of the snapshot that the new one adds to, an
	// absolute path; "" for none. ParentPath is how the new one will refer to
	// it: absolute, or relative to the new one's folder.
	Parent, ParentPath string
	// Compression of pages; empty means none.
	Compression snapshot.Compression
	// Stop ends the VM when it is saved, instead of letting it go on.
	Stop bool
	// Paused pauses the VM first instead of saving while it runs. A VM that is
	// paused already stays so.
	Paused bool
	// Progress hears how far the save is, if not nil. It must not block.
	Progress func(SaveProgress)
}

// SavePhase is what a save is at.
type SavePhase string

// The phases, in their order.
const (
	// SavePrepare opens the parent and makes overlays.
	SavePrepare SavePhase = "prepare"
	// SaveMemory names and stores memory while the guest runs.
	SaveMemory SavePhase = "memory"
	// SavePause stores what was written last.
	SavePause SavePhase = "pause"
	// SaveCommit makes the snapshot whole and durable.
	SaveCommit SavePhase = "commit"
)

// SaveProgress is how far a save is.
type SaveProgress struct {
	Phase SavePhase `json:"phase"`
	// Done and Total are bytes of guest memory, of the phase.
	Done  uint64 `json:"done"`
	Total uint64 `json:"total"`
}

// SaveReport says what a save did.
type SaveReport struct {
	ID snapshot.ID `json:"id"`
	// Pause is how long the guest stood still, of Took.
	Pause time.Duration `json:"pause_ns"`
	Took  time.Duration `json:"took_ns"`
	// Holds is what memory is, Stored what the snapshot's files hold of the disk,
	// in bytes.
	Holds  snapshot.Holds `json:"holds"`
	Stored uint64         `json:"stored"`
	// Rounds counts how often written pages were collected.
	Rounds int `json:"rounds"`
	// Overlays are the files that the VM's disks are written to from now on, in
	// the order of the disks; "" for those that are read-only.
	Overlays []string `json:"overlays"`
	// Parent is the parent's identity, "" for none.
	Parent string `json:"parent,omitempty"`
}
