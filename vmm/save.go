package vmm

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"time"

	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/naming"
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

// Save makes a snapshot of the VM, by default while it runs:
//
//	prepare   the parent is opened, overlays are made        guest runs
//	memory    all is armed, named and stored; what is
//	          written meanwhile is stored in rounds          guest runs
//	pause     state; what was written last; disks are
//	          frozen under their overlays                    some milliseconds
//	commit    digests, fsync, manifest, name                 guest runs
//
// A VM that is paused already is saved as it is and stays so. Whatever fails, and
// a context that ends, leaves the VM as it was, its disks without overlays, and
// nothing of a snapshot. One save runs at a time: another fails with
// [snapshot.ErrBusy].
//
// The configuration in the manifest names the disks as they were frozen; what
// runs on from the snapshot puts overlays of its own on them.
func (m *VM) Save(ctx context.Context, host SaveHost, o SaveOptions) (SaveReport, error) {
	began := time.Now()
	defer m.dropMaps()
	s := &saving{copying: copying{m: m}, host: host, o: o}
	report, err := s.save(ctx)
	if err != nil {
		return SaveReport{}, fmt.Errorf("save: %w", err)
	}
	report.Pause, report.Took = s.stood, time.Since(began)
	return report, nil
}

// saving is a save under way.
type saving struct {
	copying
	host SaveHost
	o    SaveOptions

	parent *snapshot.Snapshot // nil for none
	w      *snapshot.Writer
	tops   []*top

	mapped bool // the writer has the map
	// expected is how many pages may be written when the VM is paused.
	expected uint64
	// dirty are pages that were written, or have lost their names, and are not
	// stored since; lost are those of the second kind that are not dirty yet.
	dirty, lost *memory.PageSet
	sections    []snapshot.Section

	report SaveReport
}

// top is a disk that the guest writes.
type top struct {
	n       int // of the disk
	disk    *vmDisk
	overlay savehost.Overlay
	// frozen: the disk is, under the overlay unless the VM is to end.
	frozen bool
}

func (s *saving) save(ctx context.Context) (SaveReport, error) {
	ctx, done, err := s.begin(ctx)
	if err != nil {
		return SaveReport{}, errors.Join(err, s.host.Abort())
	}
	defer s.closeParent()
	defer done()
	if err := s.run(ctx); err != nil {
		return SaveReport{}, errors.Join(err, s.undo(context.WithoutCancel(ctx), err))
	}
	if s.o.Stop {
		s.m.end(Exit{Reason: ExitSaved})
	}
	return s.report, nil
}

func (s *saving) run(ctx context.Context) error {
	// A guest that ends while its memory is stored is not saved; one that ends
	// after it was captured is.
	alive, done := s.whileAlive(ctx)
	defer done()
	s.tell(SavePrepare, 0, 0)
	if err := s.prepare(alive); err != nil {
		return err
	}
	s.tell(SaveMemory, 0, s.m.mem.Size())
	if err := s.storeMemory(alive); err != nil {
		return err
	}
	s.tell(SavePause, 0, 0)
	if err := s.capture(alive); err != nil {
		return err
	}
	s.tell(SaveCommit, 0, 0)
	return s.commit(ctx)
}

func (s *saving) tell(phase SavePhase, done, total uint64) {
	if s.o.Progress != nil {
		s.o.Progress(SaveProgress{phase, done, total})
	}
}

// closeParent closes what the save has opened.
func (s *saving) closeParent() {
	if s.parent == nil {
		return
	}
	if err := s.parent.Close(); err != nil {
		s.m.log.Warn("after a snapshot was saved", "err", err)
	}
}

// prepare does what can fail before memory is looked at.
func (s *saving) prepare(ctx context.Context) error {
	if err := s.openParent(); err != nil {
		return err
	}
	if s.o.Paused {
		s.m.mu.Lock()
		err := s.stand(ctx)
		s.m.mu.Unlock()
		if err != nil {
			return err
		}
	}
	if err := s.freezeFiles(ctx); err != nil {
		return err
	}
	return s.createWriter()
}

func (s *saving) openParent() error {
	if s.o.Parent == "" {
		return nil
	}
	var err error
	s.parent, err = snapshot.Open(s.o.Parent, snapshot.OpenOptions{
		OpenFile: s.host.OpenSnapshotFile,
		FindParent: func(dir string, p snapshot.Parent) (string, error) {
			return savehost.ParentDir(dir, p), nil
		},
	})
	if err == nil {
		s.report.Parent = s.parent.ID().String()
	}
	return err
}

// freezeFiles has the host mark the disks' files as immutable and make overlays
// on them. The machine writes the files until it stacks the overlays.
func (s *saving) freezeFiles(ctx context.Context) error {
	m := s.m
	for n := range m.disks {
		d := &m.disks[n]
		if d.image.ReadOnly() {
			continue
		}
		if !s.o.Stop && len(d.image.Layers()) >= chain.MaxDepth {
			return fmt.Errorf("disk %d, %s, is a stack of %d images, the most there may be: merge some with 'ditto image commit' when the machine is off", n, d.image.Path(), chain.MaxDepth)
		}
		below, err := filepath.Abs(d.image.Path())
		if err != nil {
			return err
		}
		t := &top{n: n, disk: d, overlay: savehost.Overlay{FD: -1, Buffered: -1}}
		s.tops = append(s.tops, t)
		t.overlay, err = s.host.Overlay(ctx, savehost.OverlayRequest{
			Disk: n, Below: below, Format: d.image.Layers()[0].Format(), Size: d.image.Size(),
			Direct: d.image.Cache() == disk.CacheNone, FreezeOnly: s.o.Stop,
		})
		if err != nil {
			t.overlay = savehost.Overlay{FD: -1, Buffered: -1}
			return err
		}
	}
	if m.naming != nil && !m.naming.Room(len(s.tops)) {
		return errors.New("the machine has had too many disk layers to name memory by: restart it")
	}
	return nil
}

func (s *saving) createWriter() error {
	m := s.m
	described, err := m.describe()
	if err != nil {
		return err
	}
	layers, err := m.layerSources()
	if err != nil {
		return err
	}
	s.w, err = snapshot.Create(s.host, snapshot.Options{
		Space: m.mem, Ditto: m.version, Config: described, Layers: layers,
		Parent: s.parent, ParentPath: s.o.ParentPath, Compression: s.o.Compression,
		Workers: liveWorkers(), Progress: s.stored,
	})
	return err
}

// describe returns what the VM was made of, in JSON, with the disks that it has
// now.
func (m *VM) describe() (json.RawMessage, error) {
	c := m.cfg
	c.Disks, c.Nets = slices.Clone(c.Disks), append([]config.Net{}, c.Nets...)
	for i := range c.Disks {
		top := m.disks[i].image.Layers()[0]
		path, err := filepath.Abs(top.Path())
		if err != nil {
			return nil, err
		}
		c.Disks[i].Path, c.Disks[i].Format = path, top.Format()
	}
	return json.Marshal(c)
}

// layerSources are the layers that pages may be named by once the disks are
// frozen.
func (m *VM) layerSources() ([]snapshot.LayerSource, error) {
	if m.naming != nil {
		return m.naming.Sources(), nil
	}
	var files []*boot.Image
	for _, f := range []*boot.Image{m.source.kernel, m.source.initrd} {
		if f != nil {
			files = append(files, f)
		}
	}
	var images []*chain.Chain
	for _, d := range m.disks {
		images = append(images, d.image)
	}
	return naming.Declare(files, images...)
}

// commit makes the snapshot whole.
func (s *saving) commit(ctx context.Context) error {
	id, err := s.w.Commit(ctx, s.sections)
	if err != nil {
		return err
	}
	s.report.ID, s.report.Holds, s.report.Stored = id, s.w.Manifest().Holds, s.w.Stored()
	s.report.Overlays = make([]string, len(s.m.disks))
	for _, t := range s.tops {
		s.report.Overlays[t.n] = t.overlay.Path
	}
	return nil
}
