package snapshot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"ditto.vm/images/layer"
	"ditto.vm/internal/parallel"
	"ditto.vm/memory"
)

// LayerFile is an open layer: what a guest reads from it.
type LayerFile interface {
	io.ReaderAt
	// Size returns the bytes that a guest sees.
	Size() int64
	// Stamp reads the stamp of the file as it is now.
	Stamp() (layer.Stamp, error)
	Close() error
}

// Extenter is a [LayerFile] that can be mapped, at least in places.
type Extenter interface {
	// Extent returns where the layer's bytes from off on lie as they are: a
	// file, the offset there, and for how many bytes that holds. It is for none
	// when they must be read.
	Extent(off int64) (f *os.File, at, size int64)
}

// layerName is what leads to a layer: a snapshot and its ancestors, which name
// pages by the same disks, open each but once. Opened by every one of them, with
// all that it is stacked on, the files of a long chain would be thousands.
type layerName struct {
	id           layer.ID
	path, beside string // absolute, and the folder of the snapshots
	format       string
	size         int64
}

// sharedLayers are the open layers of a snapshot and its ancestors.
type sharedLayers struct {
	mu    sync.Mutex // guards the following
	files map[layerName]*sharedLayer
}

// sharedLayer is closed by the last of those who opened it.
type sharedLayer struct {
	LayerFile
	of    *sharedLayers
	name  layerName
	users int
}

func (l *sharedLayer) Close() error {
	l.of.mu.Lock()
	defer l.of.mu.Unlock()
	if l.users--; l.users > 0 {
		return nil
	}
	delete(l.of.files, l.name)
	return l.LayerFile.Close()
}

// Extent implements [Extenter], for none where the layer cannot be mapped.
func (l *sharedLayer) Extent(off int64) (f *os.File, at, size int64) {
	if e, ok := l.LayerFile.(Extenter); ok {
		return e.Extent(off)
	}
	return nil, 0, 0
}

// open opens a layer of the snapshot in dir.
func (s *sharedLayers) open(dir string, l Layer, open func(dir string, l Layer) (LayerFile, error)) (LayerFile, error) {
	name := layerName{id: l.ID, path: beside(dir, l.Path), beside: filepath.Dir(dir), format: l.Format, size: l.Size}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.files[name]; f != nil {
		f.users++
		return f, nil
	}
	f, err := open(dir, l)
	if err != nil {
		return nil, err
	}
	if s.files == nil {
		s.files = make(map[layerName]*sharedLayer)
	}
	s.files[name] = &sharedLayer{LayerFile: f, of: s, name: name, users: 1}
	return s.files[name], nil
}

// layerSet are the layers of a snapshot, opened when they are needed.
type layerSet struct {
	mu    sync.Mutex // guards the following
	files []LayerFile
	// proven: pages named by layers are what they were.
	proven bool
}

func (l *layerSet) close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	var errs []error
	for _, f := range l.files {
		if f != nil {
			errs = append(errs, f.Close())
		}
	}
	l.files = nil
	return errors.Join(errs...)
}

// layer returns a layer, opened.
func (s *Snapshot) layer(i int) (LayerFile, error) {
	s.layers.mu.Lock()
	defer s.layers.mu.Unlock()
	if s.layers.files == nil {
		s.layers.files = make([]LayerFile, len(s.m.Layers))
	}
	if f := s.layers.files[i]; f != nil {
		return f, nil
	}
	l := s.m.Layers[i]
	f, err := s.o.shared.open(s.dir, l, s.o.OpenLayer)
	if err != nil {
		return nil, fmt.Errorf("%w: %s: %w", ErrLayer, l.Path, err)
	}
	if f.Size() != l.Size {
		return nil, errors.Join(fmt.Errorf("%w: %s had %d bytes and has %d", ErrLayer, l.Path, l.Size, f.Size()), f.Close())
	}
	s.layers.files[i] = f
	return f, nil
}

// isProven reports whether layers were checked.
func (s *Snapshot) isProven() bool {
	s.layers.mu.Lock()
	defer s.layers.mu.Unlock()
	return s.layers.proven
}

// CheckLayers makes sure that all layers that pages of the snapshot or an
// ancestor are named by are what they were: by the stamp of the file, and where
// that is another, by reading all blocks that name pages. Nobody may write them
// from then on. Errors wrap [ErrLayer].
func (s *Snapshot) CheckLayers(ctx context.Context) error {
	for ; s != nil; s = s.parent {
		if s.isProven() {
			continue
		}
		var read []int // runs
		trusted := make([]bool, len(s.m.Layers))
		for i, used := range s.usedLayers() {
			if !used {
				continue
			}
			f, err := s.layer(i)
			if err != nil {
				return fmt.Errorf("snapshot %s: %w", s.dir, err)
			}
			stamp, err := f.Stamp()
			trusted[i] = err == nil && s.m.Layers[i].Stamp == Stamp(stamp)
		}
		for _, i := range s.p.blocks {
			if !trusted[s.p.runs[i].Layer] {
				read = append(read, int(i))
			}
		}
		if err := s.checkBlocks(ctx, read, runtime.NumCPU()); err != nil {
			return fmt.Errorf("snapshot %s: %w", s.dir, err)
		}
		s.layers.mu.Lock()
		s.layers.proven = true
		s.layers.mu.Unlock()
	}
	return nil
}

// usedLayers tells of each layer whether pages are named by it.
func (s *Snapshot) usedLayers() []bool {
	used := make([]bool, len(s.m.Layers))
	for _, i := range s.p.blocks {
		used[s.p.runs[i].Layer] = true
	}
	return used
}

// checkBlocks reads and checks runs of blocks.
func (s *Snapshot) checkBlocks(ctx context.Context, runs []int, workers int) error {
	buffers := make([][]byte, max(1, workers))
	return parallel.Do(ctx, workers, len(runs), func(_ context.Context, w, i int) error {
		if buffers[w] == nil {
			buffers[w] = make([]byte, maxBlockRun*memory.PageSize)
		}
		return s.readBlocks(runs[i], buffers[w])
	})
}

// readBlocks reads the blocks of the run at place i into b, and checks them.
func (s *Snapshot) readBlocks(i int, b []byte) error {
	r := s.p.runs[i]
	f, err := s.layer(r.Layer)
	if err != nil {
		return err
	}
	b = b[:r.Pages*memory.PageSize]
	if err := readFull(f, b, int64(r.Number)*memory.PageSize); err != nil {
		return fmt.Errorf("%w: %s: read %d blocks from %d on: %w", ErrLayer, s.m.Layers[r.Layer].Path, r.Pages, r.Number, err)
	}
	want, err := s.p.blockDigest(i)
	if err != nil {
		return err
	}
	if blocksDigest(s.p.seed, b, r.Indexed) != want {
		return fmt.Errorf("%w: %s: the %d blocks from %d on are not what they were", ErrLayer, s.m.Layers[r.Layer].Path, r.Pages, r.Number)
	}
	return nil
}
