package archive

import (
	"bytes"
	"context"
	"errors"
	"iter"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/images/qcow2"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// blockIndex finds the blocks of an image.
type blockIndex map[[16]byte]uint64

func (x blockIndex) MayHold(uint64) bool                    { return true }
func (x blockIndex) Digest(uint64) (d [16]byte, known bool) { return d, false }
func (x blockIndex) Blocks(d [16]byte) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		if n, ok := x[d]; ok {
			yield(n)
		}
	}
}

// sceneDisk is an image and what a guest reads from it.
type sceneDisk struct {
	path    string
	id      layer.ID
	format  chain.Format
	content []byte
}

// scene is a guest memory, disks whose blocks it holds, and a folder with both
// and with snapshots.
//
//	base.img <- web.qcow2 <- web.second.qcow2, kernel
type scene struct {
	t     testing.TB
	dir   string
	rng   *rand.ChaCha8
	space *memory.Space
	disks []sceneDisk
}

// quickDir is a folder where syncing costs nothing, if there is one.
func quickDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "archive-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

const sceneSize = 1 << 20

func newScene(t testing.TB) *scene {
	t.Helper()
	s := &scene{t: t, dir: quickDir(t), rng: rand.NewChaCha8([32]byte{1})}
	var err error
	if s.space, err = memory.New(memory.Config{Size: sceneSize, HugePages: memory.HugePagesOff}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.space.Close() })
	// The base has a hole, and the kernel does not end at a sector.
	base := make([]byte, 256<<10)
	s.rng.Read(base[:100<<10])
	s.rng.Read(base[200<<10:])
	s.addFile("base.img", base)
	s.addOverlay("web.qcow2", 0)
	kernel := make([]byte, 5*memory.PageSize+77)
	s.rng.Read(kernel)
	s.addFile("kernel", kernel)
	return s
}

func (s *scene) at(name string) string { return filepath.Join(s.dir, name) }

func (s *scene) addFile(name string, content []byte) {
	s.t.Helper()
	if err := os.WriteFile(s.at(name), content, 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.disks = append(s.disks, sceneDisk{s.at(name), layer.NewWritten(), chain.Raw, content})
}

// addOverlay stacks an image on a disk, with two clusters of its own.
func (s *scene) addOverlay(name string, on int) {
	s.t.Helper()
	below := s.disks[on]
	content := bytes.Clone(below.content)
	if err := chain.CreateOverlay(s.at(name), below.path, below.format, int64(len(content))); err != nil {
		s.t.Fatal(err)
	}
	c, err := chain.Open(s.at(name), chain.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	own := content[64<<10:][:128<<10]
	s.rng.Read(own)
	if err := errors.Join(c.WriteAtv([][]byte{own}, 64<<10), c.Close()); err != nil {
		s.t.Fatal(err)
	}
	s.disks = append(s.disks, sceneDisk{s.at(name), layer.NewWritten(), chain.Qcow2, content})
}

func (s *scene) page(gfn memory.GFN) []byte {
	s.t.Helper()
	b, err := s.space.Writable(gfn.GPA(), memory.PageSize)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

// save saves memory, named by disks, without a parent if that is "".
func (s *scene) save(name, parent string, c snapshot.Compression, disks ...int) {
	s.t.Helper()
	o := snapshot.Options{Space: s.space, Ditto: "v1", Config: []byte(`{"name":"web"}`), Created: time.Unix(1e9, 0), Compression: c}
	pass := names.Pass{Space: s.space}
	for i, n := range disks {
		d := s.disks[n]
		x := make(blockIndex)
		for at := 0; at+memory.PageSize <= len(d.content); at += memory.PageSize {
			x[layer.Sum(d.content[at:][:memory.PageSize])] = uint64(at / memory.PageSize)
		}
		source := bytes.NewReader(d.content)
		pass.Layers = append(pass.Layers, names.Layer{Title: d.path, Size: int64(len(d.content)), Immutable: true, Source: source, Index: x})
		l := snapshot.Layer{ID: d.id, Path: d.path, Size: int64(len(d.content)), Format: string(d.format)}
		o.Layers = append(o.Layers, snapshot.LayerSource{Layer: l, Names: names.LayerID(i), Source: source})
	}
	if parent != "" {
		p, err := snapshot.Open(s.at(parent), snapshot.OpenOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		defer p.Close()
		o.Parent, o.ParentPath = p, s.at(parent)
	}
	m, err := pass.Run(context.Background())
	if err != nil {
		s.t.Fatal(err)
	}
	target, err := snapshot.NewTarget(s.at(name))
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := snapshot.Create(target, o)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := w.Capture(context.Background(), snapshot.Capture{Map: m}); err != nil {
		s.t.Fatal(err)
	}
	sections := []snapshot.Section{{Name: "cpu", Version: 3, Bytes: []byte("registers")}, {Name: "rtc", Version: 1}}
	if _, err := w.Commit(context.Background(), sections); err != nil {
		s.t.Fatal(err)
	}
}

// two saves a snapshot and one that adds to it, when the disk is frozen once
// more. The first has a working set.
func (s *scene) two(c snapshot.Compression) {
	s.t.Helper()
	for i := range 20 {
		s.rng.Read(s.page(memory.GFN(i))[:500])
	}
	copy(s.page(30), s.disks[1].content[64<<10:]) // of web.qcow2
	copy(s.page(31), s.disks[1].content)          // of base.img
	copy(s.page(32), s.disks[2].content)          // of the kernel
	s.save("first", "", c, 0, 1, 2)
	if err := os.WriteFile(filepath.Join(s.at("first"), snapshot.WorkingSet), []byte("0 1 2"), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.addOverlay("web.second.qcow2", 1)
	s.rng.Read(s.page(40))
	copy(s.page(41), s.disks[3].content[64<<10:])
	s.save("second", "first", c, 1, 3)
}

// tiny saves two snapshots that take little, in a memory of which they are all
// there is.
func (s *scene) tiny() {
	s.t.Helper()
	s.disks = nil
	content := bytes.Repeat([]byte("a base image of two blocks\n"), 400)[:2*memory.PageSize]
	s.addFile("tiny.img", content)
	top := bytes.Clone(content)
	copy(top[memory.PageSize:], bytes.Repeat([]byte("an overlay\n"), 100))
	o := qcow2.CreateOptions{Size: int64(len(top)), ClusterSize: 512, Backing: "tiny.img", BackingFormat: "raw"}
	if err := qcow2.Create(s.at("tiny.qcow2"), o); err != nil {
		s.t.Fatal(err)
	}
	c, err := chain.Open(s.at("tiny.qcow2"), chain.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	if err := errors.Join(c.WriteAtv([][]byte{top[memory.PageSize:]}, memory.PageSize), c.Close()); err != nil {
		s.t.Fatal(err)
	}
	s.disks = append(s.disks, sceneDisk{s.at("tiny.qcow2"), layer.NewWritten(), chain.Qcow2, top})
	copy(s.page(1), content)
	copy(s.page(2), top[memory.PageSize:])
	copy(s.page(3), "a page of its own")
	s.save("parent", "", snapshot.None, 1)
	copy(s.page(4), "another")
	s.save("child", "parent", snapshot.Zstd, 1)
}

// checkLoad compares what a snapshot holds with memory.
func (s *scene) checkLoad(dir string) {
	s.t.Helper()
	snap, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		s.t.Fatal(err)
	}
	defer snap.Close()
	space, err := memory.New(memory.Config{Size: sceneSize, HugePages: memory.HugePagesOff})
	if err != nil {
		s.t.Fatal(err)
	}
	defer space.Close()
	if err := snap.Load(context.Background(), space, snapshot.LoadOptions{}); err != nil {
		s.t.Fatal(err)
	}
	for gfn := range memory.GFN(sceneSize / memory.PageSize) {
		got, err := space.View(gfn.GPA(), memory.PageSize)
		if err != nil || !bytes.Equal(got, s.page(gfn)) {
			s.t.Fatalf("page %s differs, %v", gfn, err)
		}
	}
}

// export returns an archive of a snapshot.
func (s *scene) export(name string) []byte {
	s.t.Helper()
	var b bytes.Buffer
	if _, err := Export(context.Background(), s.at(name), &b, Options{Ditto: "v1"}); err != nil {
		s.t.Fatal(err)
	}
	return b.Bytes()
}
