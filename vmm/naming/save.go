package naming

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
)

// ErrChanged is wrapped when somebody else has changed an image that memory is
// named after.
var ErrChanged = errors.New("a disk or one of its indexes was changed by another program; the machine does not use it to name memory any more")

// Sources are the layers that a snapshot may name pages by, if the machine's
// disks are frozen when it is captured.
func (n *Naming) Sources() []snapshot.LayerSource {
	n.mu.Lock()
	defer n.mu.Unlock()
	known := n.table.Layers()
	var all []snapshot.LayerSource
	for _, s := range n.sources {
		if s.retired {
			continue
		}
		l := snapshot.LayerSource{
			Layer: snapshot.Layer{ID: s.identity, Path: s.path, Size: s.length(), Format: s.format},
			Names: s.id, Source: known[s.id].Source,
			Stamped: func() (snapshot.Stamp, error) { return n.stamped(s) },
		}
		if s.index != nil {
			l.Digest = s.index.Digest
		}
		if s.disk != nil {
			l.Lower = n.holders(s)
		}
		all = append(all, l)
	}
	return all
}

// stamped returns the stamp that a layer has since it is frozen. One that was
// changed before names nothing, and has none.
func (n *Naming) stamped(s *source) (snapshot.Stamp, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case s.watch == nil:
		return snapshot.Stamp{}, errors.New("it is not frozen")
	case s.watch.bad:
		return snapshot.Stamp{}, nil
	}
	now, err := s.stamp()
	if err != nil {
		return snapshot.Stamp{}, err
	}
	if d := s.watch.stamp.Difference(now); d != "" {
		return snapshot.Stamp{}, fmt.Errorf("%w: %s", ErrChanged, d)
	}
	return snapshot.Stamp(now), nil
}

// holders returns what tells which layer of the chain holds blocks, as
// [snapshot.LayerSource] wants it.
func (n *Naming) holders(s *source) func(block, blocks uint64) (names.LayerID, uint64, error) {
	return func(block, blocks uint64) (names.LayerID, uint64, error) {
		const size = names.BlockSize
		at := int64(block) * size
		e, err := s.disk.Map(at, min(int64(blocks)*size, s.disk.Size()-at))
		switch {
		case err != nil:
			return 0, 0, err
		case e.Length < size:
			return s.id, 1, nil // it lies in several
		case e.Layer == nil:
			return s.id, uint64(e.Length) / size, nil
		}
		n.mu.Lock()
		defer n.mu.Unlock()
		if in := n.of(e.Layer); in != nil {
			return in.id, uint64(e.Length) / size, nil
		}
		return s.id, uint64(e.Length) / size, nil
	}
}

// Declare is the layers of files and disks of a machine whose memory has no
// names, so that they are found again.
func Declare(files []*boot.Image, disks ...*chain.Chain) ([]snapshot.LayerSource, error) {
	var all []snapshot.LayerSource
	for _, f := range files {
		path, err := filepath.Abs(f.Name)
		if err != nil {
			return nil, err
		}
		all = append(all, snapshot.LayerSource{
			Layer: snapshot.Layer{ID: layer.NewWritten(), Path: path, Size: f.Size, Format: string(chain.Raw)},
			Names: names.LayerID(len(all)), Source: f.Reader,
		})
	}
	for _, c := range disks {
		for _, l := range c.Layers() {
			path, err := filepath.Abs(l.Path())
			if err != nil {
				return nil, err
			}
			s := &source{disk: l}
			all = append(all, snapshot.LayerSource{
				Layer: snapshot.Layer{ID: layer.NewWritten(), Path: path, Size: sizeOf(l), Format: string(l.Format())},
				Names: names.LayerID(len(all)), Source: l,
				Stamped: func() (snapshot.Stamp, error) {
					stamp, err := s.stamp()
					return snapshot.Stamp(stamp), err
				},
			})
		}
	}
	return all, nil
}

// Changed takes out of use what somebody changed although it is immutable, and
// reports whether there was anything.
func (n *Naming) Changed() bool {
	files := n.checkFiles()
	return n.CheckIndexes() || files
}

// Prove proves what can be proven of the names of layers that are still written.
// All of memory is armed and the prover stands.
func (n *Naming) Prove(ctx context.Context, workers int) error {
	return n.prover.ProveAll(ctx, workers)
}

// Release gives what was armed to the prover, as far as it proves names, and
// disarms the rest. The prover stands.
func (n *Naming) Release() error { return n.prover.Take() }
