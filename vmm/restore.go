package vmm

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// RestoreMode is how the memory of a restored machine comes back.
type RestoreMode int

// The modes.
const (
	// RestoreLazy maps what can be mapped and fetches the rest when the guest
	// touches it, and in the background.
	RestoreLazy RestoreMode = iota
	// RestoreEager reads all of memory before the guest runs.
	RestoreEager
	// RestorePrefetch is lazy, and begins with what an earlier restore of the
	// snapshot touched first.
	RestorePrefetch
)

var restoreModeNames = [...]string{"lazy", "eager", "prefetch"}

// String returns lazy, eager or prefetch.
func (m RestoreMode) String() string {
	if m < 0 || int(m) >= len(restoreModeNames) {
		return fmt.Sprintf("RestoreMode(%d)", int(m))
	}
	return restoreModeNames[m]
}

// MarshalText implements encoding.TextMarshaler.
func (m RestoreMode) MarshalText() ([]byte, error) { return []byte(m.String()), nil }

// UnmarshalText implements encoding.TextUnmarshaler.
func (m *RestoreMode) UnmarshalText(text []byte) error {
	for i, name := range restoreModeNames {
		if strings.EqualFold(string(text), name) {
			*m = RestoreMode(i)
			return nil
		}
	}
	return fmt.Errorf("unknown restore mode %q: use %s", text, strings.Join(restoreModeNames[:], ", "))
}

// SnapshotOptions are the options of a VM that is restored from a snapshot.
type SnapshotOptions struct {
	RestoreOptions
	Mode RestoreMode
	// WorkingSet, if not nil, gets what the guest touches first, as the next
	// restore may want it: a file of [snapshot.CreateWorkingSet]. It is closed
	// when that is written, or with the VM.
	WorkingSet *os.File
	// Config is the new machine, which may have another name and other paths
	// than the saved one, but is otherwise the same.
	Config config.Config

	root string // of the host's /proc and /sys, in tests; "" for /
}

// RestoreSnapshot makes a VM of a snapshot, paused: [VM.Resume] lets the guest go
// on. It takes over the snapshot, and the file of the working set, also when it
// fails. Everything that needs rights is opened here. ctx bounds the making only.
//
// The files of the snapshot, and the layers that it names pages by, must not
// change as long as the VM lives: what it has not written is mapped from them.
func RestoreSnapshot(ctx context.Context, s *snapshot.Snapshot, o SnapshotOptions) (*VM, error) {
	r := &restored{snapshot: s, dir: s.Dir(), mode: o.Mode, set: o.WorkingSet, root: cmp.Or(o.root, "/")}
	m, err := restore(ctx, o.Config, s.Sections(), func(m *VM) error { return r.fill(ctx, m) }, o.RestoreOptions)
	if err != nil {
		return nil, errors.Join(err, r.close())
	}
	r.matchLayers()
	return m, nil
}
