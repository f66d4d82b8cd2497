package snapshot

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/layer"
	"ditto.vm/images/qcow2"
	"ditto.vm/memory"
)

// stacked makes the scene's layer a qcow2 overlay at s.path, on a raw image that
// holds every second 64 KiB of it and ends before it does.
func (s *scene) stacked() {
	s.t.Helper()
	s.content = s.content[:len(s.content)/512*512]
	base := append([]byte(nil), s.content[:len(s.content)/2]...)
	for at := 0; at+64<<10 < len(base); at += 128 << 10 {
		clear(base[at:][:64<<10])
	}
	below := filepath.Join(s.dir, "base.img")
	s.path = filepath.Join(s.dir, "top.qcow2")
	err := errors.Join(os.WriteFile(below, base, 0o600), chain.CreateOverlay(s.path, below, chain.Raw, int64(len(s.content))))
	if err != nil {
		s.t.Fatal(err)
	}
	c, err := chain.Open(s.path, chain.Options{})
	if err != nil {
		s.t.Fatal(err)
	}
	for at := 0; at < len(s.content); at += 64 << 10 {
		part := s.content[at:min(at+64<<10, len(s.content))]
		if at >= len(base)-64<<10 || at/(64<<10)%2 == 0 {
			if err := c.WriteAtv([][]byte{part}, int64(at)); err != nil {
				s.t.Fatal(err)
			}
		}
	}
	if err := c.Close(); err != nil {
		s.t.Fatal(err)
	}
}

// imageSource declares the layer at s.path as a frozen one.
func (s *scene) imageSource(format string) LayerSource {
	s.t.Helper()
	l := Layer{ID: layer.NewWritten(), Path: s.path, Size: int64(len(s.content)), Format: format}
	f, err := OpenLayer(s.dir, l)
	if err != nil {
		s.t.Fatal(err)
	}
	defer f.Close()
	stamp, err := f.Stamp()
	if err != nil {
		s.t.Fatal(err)
	}
	l.Stamp = Stamp(stamp)
	x := newIndex(s.content)
	return LayerSource{Layer: l, Source: s.nameLayers()[0].Source, Digest: x.Digest}
}

// TestImages saves memory that is named by blocks of a qcow2 image and what it is
// stacked on, and maps what lies in either as it is.
func TestImages(t *testing.T) {
	for _, compressed := range []bool{false, true} {
		s := newScene(t, 60, 4<<20)
		s.stacked()
		if compressed {
			packed := filepath.Join(s.dir, "packed.qcow2")
			if _, err := exec.LookPath("qemu-img"); err != nil {
				t.Skip("qemu-img is not installed; try: apt install qemu-utils")
			}
			if out, err := exec.Command("qemu-img", "convert", "-c", "-O", "qcow2", s.path, packed).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			s.path = packed
		}
		s.scribble(60)
		for gfn := range memory.GFN(32) { // a whole cluster of the overlay, and one of the base
			copy(s.page(gfn), s.content[int(gfn)*memory.PageSize:])
		}
		o := s.options(None)
		o.Layers = []LayerSource{s.imageSource("qcow2")}
		s.save("snap", o, Capture{Map: s.pass(false)})
		snap := s.open("snap")
		s.checkAll(snap, true)
		plan, err := snap.Plan(context.Background(), PlanOptions{})
		if err != nil {
			t.Fatal(err)
		}
		mapped := map[string]bool{}
		for _, row := range plan.Maps {
			mapped[filepath.Base(row.File.Name())] = true
		}
		if mapped["top.qcow2"] == compressed || mapped["base.img"] == compressed || mapped["packed.qcow2"] {
			t.Errorf("compressed %t: mapped are %v", compressed, mapped)
		}
		// While it is open nobody writes what it was made of.
		if _, err := chain.Open(s.path, chain.Options{}); !errors.Is(err, disk.ErrLocked) {
			t.Errorf("a layer in use could be opened for writing: %v", err)
		}
	}
}

// TestImageChanged: what an image is stacked on counts as much as itself.
func TestImageChanged(t *testing.T) {
	s := newScene(t, 61, 1<<20)
	s.stacked()
	copy(s.page(0), s.content)                      // of the overlay
	copy(s.page(1), s.content[16*memory.PageSize:]) // of the base
	o := s.options(None)
	o.Layers = []LayerSource{s.imageSource("qcow2")}
	s.save("snap", o, Capture{Map: s.pass(false)})
	base := filepath.Join(s.dir, "base.img")
	was, err := os.ReadFile(base)
	if err != nil {
		t.Fatal(err)
	}
	check := func(what string, want error) {
		t.Helper()
		snap, err := Open(filepath.Join(s.dir, "snap"), OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer snap.Close()
		if err := snap.CheckLayers(context.Background()); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	check("as it was", nil)
	altered := slices.Clone(was)
	altered[17*memory.PageSize] ^= 1
	os.WriteFile(base, altered, 0o600)
	check("a block that names nothing was written", nil)
	altered[16*memory.PageSize] ^= 1
	os.WriteFile(base, altered, 0o600)
	check("a block that names a page was written", ErrLayer)
	os.WriteFile(base, was, 0o600)
	check("written anew", nil)
	os.Remove(base)
	check("what it is stacked on is gone", ErrLayer)
}

// TestOddImage: a raw image need not end at a sector.
func TestOddImage(t *testing.T) {
	s := newScene(t, 62, 1<<20)
	for i := range 4 {
		copy(s.page(memory.GFN(i)), s.content[(sceneBlocks-4+i)*memory.PageSize:])
	}
	for _, rounded := range []bool{false, true} {
		o := s.options(None)
		l := s.imageSource("raw")
		if rounded {
			l.Size = (l.Size + 511) / 512 * 512
			l.Stamp.Size = l.Size
		}
		o.Layers = []LayerSource{l}
		name := map[bool]string{false: "exact", true: "rounded"}[rounded]
		s.save(name, o, Capture{Map: s.pass(false)})
		snap := s.open(name)
		if h := snap.Manifest().Holds; h.Blocks != 4*memory.PageSize {
			t.Errorf("%s: it holds %+v", name, h)
		}
		s.checkLoad(snap)
		s.checkPlan(snap, PlanOptions{})
	}
}

// TestFindLayer: what was brought along with a snapshot comes before what lies
// where its layers once were.
func TestFindLayer(t *testing.T) {
	s := newScene(t, 63, 1<<20)
	copy(s.page(0), s.content)
	o := s.options(None)
	o.Layers = []LayerSource{s.imageSource("raw")}
	s.save("snap", o, Capture{Map: s.pass(false)})
	brought := filepath.Join(s.dir, LayersName, LayerName(o.Layers[0].ID, chain.Raw))
	if err := errors.Join(os.Mkdir(filepath.Dir(brought), 0o700), os.WriteFile(brought, s.content, 0o400)); err != nil {
		t.Fatal(err)
	}
	os.WriteFile(s.path, make([]byte, len(s.content)), 0o600)
	snap := s.open("snap")
	s.checkLoad(snap)
	if at, l, ok := snap.Locate(s.path); at != brought || l.ID != o.Layers[0].ID || !ok {
		t.Errorf("the layer is at %s, %s, %t", at, l.ID, ok)
	}
	if at, _, ok := snap.Locate(s.path + "2"); ok {
		t.Errorf("there is no such layer: %s", at)
	}
	at, isBrought := FindLayer(snap.Dir(), Layer{ID: o.Layers[0].ID, Format: "../../x", Path: "y"})
	if at != filepath.Join(snap.Dir(), "y") || isBrought {
		t.Errorf("a strange format leads to %s", at)
	}
	if err := errors.Join(os.Remove(brought), os.Symlink("/etc/passwd", brought)); err != nil {
		t.Fatal(err)
	}
	if at, isBrought := FindLayer(snap.Dir(), o.Layers[0].Layer); at != s.path || isBrought {
		t.Errorf("a link leads to %s", at)
	}
}

// TestOpenFile: another opens the files of a snapshot and of its ancestors.
func TestOpenFile(t *testing.T) {
	s := newScene(t, 64, 1<<20)
	s.fill(s.page(1))
	s.chain(2, None, false)
	var asked []string
	lend := func(dir, name string) (*os.File, error) {
		asked = append(asked, filepath.Base(dir)+"/"+name)
		if filepath.Dir(dir) != "/nowhere" {
			t.Errorf("asked for %s in %s", name, dir)
		}
		return os.Open(filepath.Join(s.dir, filepath.Base(dir), name))
	}
	here := func(_ string, l Layer) (LayerFile, error) { return OpenLayer(filepath.Join(s.dir, "snap1"), l) }
	snap, err := Open("/nowhere/snap1", OpenOptions{OpenFile: lend, OpenLayer: here})
	if err != nil {
		t.Fatal(err)
	}
	s.checkLoad(snap)
	snap.Close()
	for _, name := range []string{"snap1/pages", "snap0/pages", "snap0/pagemap", "snap1/sections/cpu"} {
		if !slices.Contains(asked, name) {
			t.Errorf("%s was opened by itself; asked for were %v", name, asked)
		}
	}
	pipe := func(string, string) (*os.File, error) {
		r, w, err := os.Pipe()
		w.Close()
		return r, err
	}
	if _, err := Open("/nowhere/snap1", OpenOptions{OpenFile: pipe}); !errors.Is(err, ErrFormat) {
		t.Errorf("a pipe was taken for a file: %v", err)
	}
}

// TestExtentEnd: nothing is mapped beyond the end of a file, though it reads as
// zeros there.
func TestExtentEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: 1 << 20}); err != nil {
		t.Fatal(err)
	}
	c, err := chain.Open(path, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	page := bytes.Repeat([]byte("x"), memory.PageSize)
	if err := errors.Join(c.WriteAtv([][]byte{page}, 0), c.Flush()); err != nil {
		t.Fatal(err)
	}
	e, err := c.Map(0, 1<<20)
	if err := errors.Join(err, c.Close()); err != nil || e.Kind != qcow2.Data {
		t.Fatalf("%+v, %v", e, err)
	}
	if err := os.Truncate(path, e.Host+memory.PageSize); err != nil {
		t.Fatal(err)
	}
	f, err := OpenLayer(t.TempDir(), Layer{ID: layer.NewWritten(), Path: path, Size: 1 << 20, Format: "qcow2"})
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, want := range map[int64]int64{0: memory.PageSize, 2048: 2048, memory.PageSize: 0, 64 << 10: 0} {
		if file, at, size := f.(Extenter).Extent(off); size != want || (file == nil) != (want == 0) || want > 0 && at != e.Host+off {
			t.Errorf("from %d on: %d bytes at %d", off, size, at)
		}
	}
}
