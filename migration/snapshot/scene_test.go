package snapshot

import (
	"bytes"
	"context"
	"encoding/json"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// memIndex finds blocks of a layer whose content is at hand.
type memIndex struct {
	digests []Digest
	blocks  map[[16]byte][]uint64
}

func newIndex(content []byte) *memIndex {
	x := &memIndex{blocks: make(map[[16]byte][]uint64)}
	for n := 0; (n+1)*memory.PageSize <= len(content); n++ {
		d := layer.Sum(content[n*memory.PageSize:][:memory.PageSize])
		x.digests = append(x.digests, d)
		x.blocks[d] = append(x.blocks[d], uint64(n))
	}
	return x
}

func (x *memIndex) MayHold(uint64) bool { return true }

func (x *memIndex) Blocks(d [16]byte) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for _, n := range x.blocks[d] {
			if !yield(n) {
				return
			}
		}
	}
}

func (x *memIndex) Digest(n uint64) ([16]byte, bool) {
	if n >= uint64(len(x.digests)) {
		return [16]byte{}, false
	}
	return x.digests[n], true
}

// scene is a guest memory, a layer whose blocks it holds, and a folder.
type scene struct {
	t       testing.TB
	rng     *rand.Rand
	space   *memory.Space
	content []byte // of the layer
	path    string // of the layer
	dir     string // for snapshots
	// unstamped layers are known by content only.
	unstamped bool
}

const sceneBlocks = 300

func newScene(t testing.TB, seed uint64, size uint64) *scene {
	t.Helper()
	return newSceneIn(t, t.TempDir(), seed, size)
}

// quickDir is a folder where syncing costs nothing, if there is one.
func quickDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "snapshot-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func newSceneIn(t testing.TB, dir string, seed uint64, size uint64) *scene {
	t.Helper()
	s := &scene{t: t, rng: rand.New(rand.NewPCG(seed, 1)), dir: dir}
	s.space = newSpace(t, size)
	s.content = make([]byte, sceneBlocks*memory.PageSize+100)
	s.fill(s.content)
	s.path = filepath.Join(s.dir, "disk.img")
	if err := os.WriteFile(s.path, s.content, 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

func newSpace(t testing.TB, size uint64) *memory.Space {
	t.Helper()
	space, err := memory.New(memory.Config{Size: size, HugePages: memory.HugePagesOff})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { space.Close() })
	return space
}

// fill writes bytes that compress a little.
func (s *scene) fill(b []byte) {
	for i := range b {
		b[i] = byte(s.rng.Uint32() % 50)
	}
}

// page returns a page of memory.
func (s *scene) page(gfn memory.GFN) []byte {
	s.t.Helper()
	b, err := s.space.Writable(gfn.GPA(), memory.PageSize)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// someRange picks up to most pages of RAM in a row.
func (s *scene) someRange(most uint64) (memory.GFN, uint64) {
	regions := s.space.Regions()
	r := regions[s.rng.IntN(len(regions))]
	pages := r.Size / memory.PageSize
	n := 1 + s.rng.Uint64N(min(most, pages))
	return r.Start.GFN() + memory.GFN(s.rng.Uint64N(pages-n+1)), n
}

// scribble changes rows of pages: unique bytes, blocks, copies of other pages,
// zeros. It adds them to the sets.
func (s *scene) scribble(rows int, into ...*memory.PageSet) {
	for range rows {
		gfn, n := s.someRange(40)
		block := s.rng.Uint64N(sceneBlocks)
		other, _ := s.someRange(1)
		for i := range n {
			page := s.page(gfn + memory.GFN(i))
			switch kind := s.rng.Uint64(); {
			case n%4 == 0 && block+i < sceneBlocks:
				copy(page, s.content[(block+i)*memory.PageSize:])
			case n%4 == 1:
				copy(page, s.page(other))
			case n%8 == 2:
				clear(page)
			case kind%16 == 0:
				clear(page)
			default:
				s.fill(page)
			}
		}
		for _, set := range into {
			set.Add(gfn.GPA(), n*memory.PageSize)
		}
	}
}

// nameLayers is the layer as names knows it.
func (s *scene) nameLayers() []names.Layer {
	return []names.Layer{{
		Title: s.path, Size: int64(len(s.content)), Immutable: true,
		Source: bytes.NewReader(s.content), Index: newIndex(s.content),
	}}
}

// pass names memory.
func (s *scene) pass(running bool) *names.Map {
	s.t.Helper()
	p := names.Pass{Space: s.space, Layers: s.nameLayers(), Running: running}
	m, err := p.Run(context.Background())
	if err != nil {
		s.t.Fatal(err)
	}
	return m
}

// layerSource declares the layer.
func (s *scene) layerSource() LayerSource {
	l := LayerSource{
		Layer:  Layer{ID: contentID(s.content), Path: "../disk.img", Size: int64(len(s.content)), Format: "raw"},
		Source: bytes.NewReader(s.content), Digest: newIndex(s.content).Digest,
	}
	f, err := layer.OpenFile(s.path)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	stamp, err := f.Stamp()
	if err != nil {
		s.t.Fatal(err)
	}
	if !s.unstamped {
		l.Stamp = Stamp(stamp)
	}
	return l
}

// contentID is the identity of a layer that fits one chunk.
func contentID(content []byte) layer.ID {
	h := layer.NewContentHasher(int64(len(content)))
	var digests [layer.ChunkBlocks]layer.Digest
	copied := newIndex(content).digests
	for i := range copied {
		digests[i] = copied[i]
	}
	h.Chunk(0, &digests)
	return h.ID(content[len(copied)*layer.BlockSize:])
}

var testSections = []Section{
	{Name: "cpu", Version: 3, Bytes: []byte("registers")},
	{Name: "virtio-blk.0", Version: 1, Bytes: nil},
}

// options are those of most tests.
func (s *scene) options(c Compression) Options {
	return Options{
		Space: s.space, Ditto: "v1.2.3", Config: json.RawMessage(`{"name":"<test>"}`), Compression: c, Seed: 7,
		Created: time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC), Layers: []LayerSource{s.layerSource()},
	}
}

// create begins a snapshot.
func (s *scene) create(name string, o Options) *Writer {
	s.t.Helper()
	target, err := NewTarget(filepath.Join(s.dir, name))
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := Create(target, o)
	if err != nil {
		s.t.Fatal(err)
	}
	return w
}

// save makes a snapshot of memory as it is.
func (s *scene) save(name string, o Options, c Capture) ID {
	s.t.Helper()
	return s.finish(s.create(name, o), c)
}

func (s *scene) finish(w *Writer, c Capture) ID {
	s.t.Helper()
	if err := w.Capture(context.Background(), c); err != nil {
		s.t.Fatal(err)
	}
	id, err := w.Commit(context.Background(), testSections)
	if err != nil {
		s.t.Fatal(err)
	}
	return id
}

// open opens a snapshot until the end of the test.
func (s *scene) open(name string) *Snapshot {
	s.t.Helper()
	snap, err := Open(filepath.Join(s.dir, name), OpenOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { snap.Close() })
	return snap
}

// checkLoad loads a snapshot and compares it with memory.
func (s *scene) checkLoad(snap *Snapshot) {
	s.t.Helper()
	space := newSpace(s.t, s.space.Size())
	if err := snap.Load(context.Background(), space, LoadOptions{}); err != nil {
		s.t.Fatal(err)
	}
	s.compare(space)
}

// compare compares another memory with the scene's, without touching holes.
func (s *scene) compare(space *memory.Space) {
	s.t.Helper()
	differ := 0
	for _, r := range s.space.Regions() {
		both := s.space.NewPageSet()
		for _, sp := range []*memory.Space{s.space, space} {
			if err := sp.Populated(r.Range, func(r memory.Range) { both.Add(r.Start, r.Size) }); err != nil {
				s.t.Fatal(err)
			}
		}
		for run := range both.Runs() {
			for gpa := run.Start; gpa < run.End(); gpa += memory.PageSize {
				a, _ := s.space.View(gpa, memory.PageSize)
				b, _ := space.View(gpa, memory.PageSize)
				if !bytes.Equal(a, b) {
					if differ++; differ < 5 {
						s.t.Errorf("page %s differs", gpa.GFN())
					}
				}
			}
		}
	}
	if differ > 0 {
		s.t.Fatalf("%d pages differ", differ)
	}
}
