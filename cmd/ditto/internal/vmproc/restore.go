package vmproc

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// Restore says how a machine comes out of a snapshot. The disks of its
// configuration are the images that the snapshot froze.
type Restore struct {
	// Dir is the snapshot.
	Dir string `json:"dir"`
	// ID is what it was when the configuration was read from it.
	ID snapshot.ID `json:"id"`
	// Mode is how memory comes back.
	Mode vmm.RestoreMode `json:"mode"`
	// Overlays is the folder that has one for each machine, with the overlays
	// that it writes to.
	Overlays string `json:"overlays"`
	// Temporary overlays have no names while the machine runs, and go with it.
	Temporary bool `json:"temporary,omitempty"`
}

// Builder returns the [Builder] of such a machine.
func (r Restore) Builder() Builder {
	return func(ctx context.Context, cfg config.Config, s Surroundings) (Machine, error) {
		m, err := r.build(ctx, cfg, s)
		if err != nil {
			return nil, err
		}
		return m, nil
	}
}

func (r Restore) build(ctx context.Context, cfg config.Config, s Surroundings) (_ *restored, err error) {
	snap, err := snapshot.Open(r.Dir, snapshot.OpenOptions{})
	if err != nil {
		return nil, err
	}
	if snap.ID() != r.ID {
		return nil, errors.Join(exit.Errorf(exit.Snapshot, "snapshot %s was replaced by another meanwhile", r.Dir), snap.Close())
	}
	var made *overlays
	if err = relocate(&cfg, snap); err == nil {
		made, err = newOverlays(filepath.Join(r.Overlays, cfg.Name), &cfg)
	}
	if err != nil {
		return nil, errors.Join(err, snap.Close())
	}
	m, err := vmm.RestoreSnapshot(ctx, snap, vmm.SnapshotOptions{
		RestoreOptions: vmm.RestoreOptions{
			Options:         vmm.Options{Log: s.Log, Console: s.Console, NetLog: &lineLog{log: s.Log}, Version: s.Version},
			NewGenerationID: true,
			NewMACs:         true,
		},
		Mode: r.Mode, WorkingSet: r.workingSet(s.Log), Config: cfg,
	})
	if err != nil {
		return nil, errors.Join(advise(err), made.remove())
	}
	if r.Temporary {
		if err := made.remove(); err != nil {
			return nil, errors.Join(err, m.Close())
		}
	}
	return &restored{newVM(m, s, disksOf(cfg, r.Temporary))}, nil
}

// workingSet opens the file that the first restore of a snapshot records in, for
// later ones to prefetch. Where it cannot, none is recorded.
func (r Restore) workingSet(log *slog.Logger) *os.File {
	if r.Mode != vmm.RestoreLazy {
		return nil
	}
	f, err := snapshot.CreateWorkingSet(r.Dir)
	if err != nil {
		log.Info("what the guest touches first is not recorded", "err", err)
	}
	return f
}

// advise adds to the failure of a network what another machine may have taken.
func advise(err error) error {
	var failed *vmm.NetError
	if !errors.As(err, &failed) {
		return err
	}
	if failed.Mode == config.NetUser {
		return fmt.Errorf("%w: say other ports with -p, or -p none", err)
	}
	return fmt.Errorf("%w: say another network with --net", err)
}

// relocate points the configuration to where its files are now: a snapshot that
// came from another host has them beside it. Disks must be what they were: what
// the guest knows of them is in its memory.
func relocate(cfg *config.Config, snap *snapshot.Snapshot) error {
	for _, path := range []*string{&cfg.Kernel, &cfg.Initrd} {
		if found, _, ok := snap.Locate(*path); ok && filepath.IsAbs(*path) {
			*path = found
		}
	}
	cfg.Disks = slices.Clone(cfg.Disks)
	for i := range cfg.Disks {
		d := &cfg.Disks[i]
		found, l, ok := snap.Locate(d.Path)
		if !ok {
			return fmt.Errorf("disk %d: %w: nothing says what %s was", i, snapshot.ErrLayer, d.Path)
		}
		// What was brought here was checked then.
		if _, brought := snapshot.FindLayer(snap.Dir(), l); !brought {
			if err := unchanged(snap.Dir(), l); err != nil {
				return fmt.Errorf("disk %d: %w", i, err)
			}
		}
		d.Path, d.Format = found, chain.Format(l.Format)
	}
	return nil
}

// unchanged checks that nobody has written a frozen image, nor what it is stacked
// on.
func unchanged(dir string, l snapshot.Layer) error {
	f, err := snapshot.OpenLayer(dir, l)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }() // it was only read
	now, err := f.Stamp()
	if err != nil {
		return err
	}
	if now.Size != l.Stamp.Size || now.Mtime != l.Stamp.Mtime {
		return fmt.Errorf("%w: %s was written since the snapshot was taken: put back the file as it was, or a copy that kept its times", snapshot.ErrLayer, l.Path)
	}
	return nil
}

// restored is a machine that goes on where it was saved.
type restored struct{ *vm }

// Start lets the guest go on.
func (r *restored) Start(ctx context.Context) error { return r.Resume(ctx) }

// disksOf describes the disks of a configuration. What may be written is on
// overlays, which may be temporary.
func disksOf(cfg config.Config, temporary bool) []registry.Disk {
	var disks []registry.Disk
	for _, d := range cfg.Disks {
		disks = append(disks, registry.Disk{
			Path: d.Path, Format: d.Format, ReadOnly: d.ReadOnly, Temporary: temporary && !d.ReadOnly,
		})
	}
	return disks
}
