package snapshot

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// Options say what a [Writer] writes.
type Options struct {
	Space *memory.Space
	// Ditto is the version of the program.
	Ditto string
	// Config is what the VM was made of, in JSON.
	Config json.RawMessage
	// Seed is that of the digests of pages; zero draws one.
	Seed uint64
	// Created is the time to be stated; zero means now.
	Created time.Time
	// Layers are those that pages may be named by. What equals blocks of any
	// other is stored.
	Layers []LayerSource
	// Parent makes the snapshot incremental. It stays open until the end.
	Parent *Snapshot
	// ParentPath is where the parent will be found: absolute, or relative to
	// the snapshot.
	ParentPath string
	// Compression of pages; empty means None.
	Compression Compression
	// Workers bounds the cores in use; zero means all.
	Workers int
	// Progress hears how many bytes of memory the current phase has dealt with,
	// if not nil. It is called by one goroutine at a time and must not block.
	Progress func(done, total uint64)
}

// LayerSource is a layer that pages may be named by.
type LayerSource struct {
	Layer
	// Written says that somebody still writes the layer: naming pages by it is
	// an error that wraps [ErrLayerWritten].
	Written bool
	// Names is the layer in names.Map.Layers.
	Names names.LayerID
	// Source reads the layer as it is for good, from any goroutine. Not through
	// an overlay.
	Source io.ReaderAt
	// Digest returns the digest of a block without reading it, if that is known
	// for sure: the layer is immutable and has an index. May be nil.
	Digest func(block uint64) (digest [16]byte, ok bool)
	// Lower returns which declared layer holds the first of n blocks and how many
	// of those that follow, which read there as they do here: names move to the
	// lowest that other snapshots and hosts may have too. Commit asks it. May be
	// nil.
	Lower func(block, n uint64) (in names.LayerID, blocks uint64, err error)
	// Stamped returns the stamp of the layer as it was captured, and fails if it
	// was changed since. Commit asks it, after all blocks were read. With nil the
	// layer's Stamp is it.
	Stamped func() (Stamp, error)
}

// Writer writes a snapshot. Its methods are called one after the other; after an
// error of any nothing is left of it.
type Writer struct {
	o       Options
	target  Target
	pages   *os.File
	regions []memory.Range
	byNames map[names.LayerID]int
	seed    uint64

	// Of each page, by its place in memory. A page belongs to one batch at a
	// time.
	slot    []uint32 // where its bytes are, plus 1
	digests []Digest // of these bytes

	// What became of pages that were looked at.
	zero, parent, stored *memory.PageSet

	mu        sync.Mutex // guards the following
	slots     uint64
	frames    []frame
	pagesSize uint64
	done      uint64 // bytes, for Progress

	encoders sync.Pool // of *zstd.Encoder
	buffers  sync.Pool // of *batch

	live     *liveMap // of AddMap
	capture  *captured
	room     []byte // for held
	held     *held  // what Capture left for Commit
	complete *Manifest
	onDisk   uint64 // bytes that the files take of the disk
	err      error  // why it is over
}

// Create begins a snapshot at the target.
func Create(target Target, o Options) (*Writer, error) {
	w := &Writer{o: o, target: target, byNames: make(map[names.LayerID]int)}
	if err := w.begin(); err != nil {
		return nil, w.fail("begin", err)
	}
	return w, nil
}

// randomSeed draws a seed.
func randomSeed() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand)
	return binary.LittleEndian.Uint64(b[:])
}

func (w *Writer) begin() error {
	if w.o.Compression == "" {
		w.o.Compression = None
	}
	if w.o.Workers <= 0 {
		w.o.Workers = runtime.NumCPU()
	}
	if w.seed = w.o.Seed; w.seed == 0 {
		w.seed = randomSeed()
	}
	if w.o.Created.IsZero() {
		w.o.Created = time.Now()
	}
	if len(w.o.Config) > 0 && !json.Valid(w.o.Config) {
		return errors.New("the configuration is not JSON")
	}
	total := uint64(0)
	for _, r := range w.o.Space.Regions() {
		w.regions = append(w.regions, r.Range)
		total += r.Size / memory.PageSize
	}
	for i, l := range w.o.Layers {
		if _, ok := w.byNames[l.Names]; ok {
			return fmt.Errorf("layer %d is declared twice", l.Names)
		}
		w.byNames[l.Names] = i
	}
	if p := w.o.Parent; p != nil {
		if !slices.Equal(p.m.regions(), w.regions) {
			return fmt.Errorf("the parent is of a memory of %d bytes, not of %d", p.m.Memory.Size, w.o.Space.Size())
		}
		if p.m.Depth()+2 > MaxChain {
			return fmt.Errorf("the parent is the last of a chain of %d snapshots: save without a parent", MaxChain)
		}
	}
	// Untouched, these take address space only.
	w.slot, w.digests = make([]uint32, total), make([]Digest, total)
	w.zero, w.parent, w.stored = w.o.Space.NewPageSet(), w.o.Space.NewPageSet(), w.o.Space.NewPageSet()
	if err := w.manifest().check(); err != nil {
		return err
	}
	var err error
	w.pages, err = w.target.Create(PagesName)
	return err
}

// fail ends the writer and removes what it wrote. It returns err, with what was
// being done.
func (w *Writer) fail(doing string, err error) error {
	if w.err != nil {
		return w.err
	}
	w.err = writeError(fmt.Errorf("snapshot: %s: %w", doing, err))
	if w.pages != nil {
		_ = w.pages.Close()
	}
	if err := w.target.Abort(); err != nil {
		w.err = errors.Join(w.err, fmt.Errorf("remove what was written: %w", err))
	}
	return w.err
}

// Abort gives up. After Commit it does nothing.
func (w *Writer) Abort() error {
	if w.err != nil {
		return nil
	}
	err := w.target.Abort()
	w.err = errors.Join(errors.New("snapshot: aborted"), w.pages.Close())
	return err
}

// index returns the place of a page of RAM in memory.
func (w *Writer) index(gfn memory.GFN) uint64 {
	if len(w.regions) > 1 && gfn >= w.regions[1].Start.GFN() {
		return w.regions[0].Size/memory.PageSize + uint64(gfn-w.regions[1].Start.GFN())
	}
	return uint64(gfn - w.regions[0].Start.GFN())
}

// AddPages stores pages early, while the guest may be writing them: what is in
// [Capture.Dirty] later is stored again. Pages may be added more than once. After
// AddMap they are those that were written since it was made, or whose names are
// false by now, and that were armed again before.
func (w *Writer) AddPages(ctx context.Context, pages *memory.PageSet) error {
	if w.err != nil {
		return w.err
	}
	if err := w.store(ctx, w.renew(pages), w.o.Workers, w.o.Space.View); err != nil {
		return w.fail("store pages", err)
	}
	return nil
}

// Commit makes the snapshot whole: digests, fsync, manifest, name. The VM may
// run. It returns the identity.
func (w *Writer) Commit(ctx context.Context, sections []Section) (ID, error) {
	if w.err != nil {
		return ID{}, w.err
	}
	id, err := w.commit(ctx, sections)
	if err != nil {
		return ID{}, w.fail("complete", err)
	}
	w.err = errors.New("snapshot: it is complete")
	return id, nil
}

func (w *Writer) commit(ctx context.Context, sections []Section) (ID, error) {
	if w.capture == nil {
		return ID{}, errors.New("nothing was captured")
	}
	if err := w.storeHeld(ctx); err != nil {
		return ID{}, err
	}
	p, err := w.pageMap(ctx)
	if err != nil {
		return ID{}, err
	}
	if err := w.trim(p); err != nil {
		return ID{}, err
	}
	if err = w.pages.Sync(); err == nil {
		w.onDisk, err = onDisk(w.pages.Fd())
	}
	if err := errors.Join(err, w.pages.Close()); err != nil {
		return ID{}, err
	}
	m := w.manifest()
	for i, l := range w.o.Layers {
		if l.Stamped == nil {
			continue
		}
		if m.Layers[i].Stamp, err = l.Stamped(); err != nil {
			return ID{}, fmt.Errorf("%w: %s: %w", ErrLayer, l.Path, err)
		}
	}
	m.Holds = p.holds
	m.Pages = File{Size: p.pagesSize, Digest: digestOfAll(p.digests)}
	b, head := p.encode()
	if m.PageMap, err = w.file(PageMapName, b); err != nil {
		return ID{}, err
	}
	m.PageMap.Digest = digestOf(b[:head])
	for _, s := range sections {
		if err := checkSection(s.Name, uint64(len(s.Bytes))); err != nil {
			return ID{}, err
		}
		f, err := w.file(SectionsName+"/"+s.Name, s.Bytes)
		if err != nil {
			return ID{}, err
		}
		m.Sections = append(m.Sections, SectionFile{Name: s.Name, Version: s.Version, File: f})
	}
	if err := m.check(); err != nil {
		return ID{}, err
	}
	text, id, err := m.encode()
	if err != nil {
		return ID{}, err
	}
	if _, err := w.file(ManifestName, text); err != nil {
		return ID{}, err
	}
	if ctx.Err() != nil {
		return ID{}, context.Cause(ctx)
	}
	w.complete = m
	return id, w.target.Commit()
}

// Manifest returns what was written, once Commit is done.
func (w *Writer) Manifest() *Manifest { return w.complete }

// Stored returns how many bytes the snapshot's files take of the disk, once
// Commit is done.
func (w *Writer) Stored() uint64 { return w.onDisk }

// file writes a file of the snapshot for good.
func (w *Writer) file(name string, b []byte) (File, error) {
	f, err := w.target.Create(name)
	if err != nil {
		return File{}, err
	}
	_, err = f.Write(b)
	w.onDisk += uint64(len(b))
	return File{Size: uint64(len(b)), Digest: digestOf(b)}, errors.Join(err, f.Sync(), f.Close())
}

// manifest returns what is known from the start.
func (w *Writer) manifest() *Manifest {
	m := &Manifest{
		Format: Format, Ditto: w.o.Ditto, Created: w.o.Created.UTC(), Config: w.o.Config,
		Memory: Memory{Size: w.o.Space.Size()}, Compression: w.o.Compression,
		Layers: []Layer{}, Sections: []SectionFile{},
	}
	for _, r := range w.regions {
		m.Memory.Regions = append(m.Memory.Regions, Range{Start: uint64(r.Start), Size: r.Size})
	}
	for _, l := range w.o.Layers {
		m.Layers = append(m.Layers, l.Layer)
	}
	if p := w.o.Parent; p != nil {
		m.Parent = &Parent{ID: p.id, Path: w.o.ParentPath, Depth: p.m.Depth() + 1}
	}
	return m
}

// encoder returns a zstd encoder for one goroutine.
func (w *Writer) encoder() (*zstd.Encoder, error) {
	if e, ok := w.encoders.Get().(*zstd.Encoder); ok {
		return e, nil
	}
	return zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithWindowSize(framePages*memory.PageSize))
}
