package vmproc

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// RestoreMode is how the memory of a restored machine comes back.
type RestoreMode string

// The modes.
const (
	RestoreLazy     RestoreMode = "lazy"     // when the guest touches it
	RestoreEager    RestoreMode = "eager"    // before the guest runs
	RestorePrefetch RestoreMode = "prefetch" // first what was touched first before
)

// Restore says how a machine comes out of a snapshot. The disks of its
// configuration are the images that the snapshot froze.
type Restore struct {
	// Dir is the snapshot.
	Dir string `json:"dir"`
	// ID is what it was when the configuration was read from it.
	ID snapshot.ID `json:"id"`
	// Mode is how memory comes back.
	Mode RestoreMode `json:"mode"`
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
	defer func() { err = errors.Join(err, snap.Close()) }()
	if snap.ID() != r.ID {
		return nil, fmt.Errorf("snapshot %s was replaced by another meanwhile", r.Dir)
	}
	relocate(&cfg, snap)
	made, err := newOverlays(filepath.Join(r.Overlays, cfg.Name), &cfg)
	if err != nil {
		return nil, err
	}
	m, err := vmm.Restore(ctx, cfg, snap.Sections(), loader(ctx, snap.Load), vmm.RestoreOptions{
		Options:         vmm.Options{Log: s.Log, Console: s.Console, NetLog: &lineLog{log: s.Log}, Version: s.Version},
		NewGenerationID: true,
		NewMACs:         true,
	})
	if err != nil {
		return nil, errors.Join(err, made.remove())
	}
	if r.Temporary {
		if err := made.remove(); err != nil {
			return nil, errors.Join(err, m.Close())
		}
	}
	return &restored{vm{VM: m, surroundings: s, disks: disksOf(cfg, r.Temporary)}}, nil
}

// relocate points the configuration to where its files are now: a snapshot that
// came from another host has them beside it.
func relocate(cfg *config.Config, snap *snapshot.Snapshot) {
	for _, path := range []*string{&cfg.Kernel, &cfg.Initrd} {
		if found, _, ok := snap.Locate(*path); ok && filepath.IsAbs(*path) {
			*path = found
		}
	}
	cfg.Disks = slices.Clone(cfg.Disks)
	for i := range cfg.Disks {
		d := &cfg.Disks[i]
		if found, l, ok := snap.Locate(d.Path); ok {
			d.Path, d.Format = found, chain.Format(l.Format)
		}
	}
}

// restored is a machine that goes on where it was saved.
type restored struct{ vm }

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

// loader fills memory by load.
func loader[M any](ctx context.Context, load func(context.Context, M, snapshot.LoadOptions) error) func(M) error {
	return func(m M) error { return load(ctx, m, snapshot.LoadOptions{}) }
}
