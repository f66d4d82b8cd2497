package naming

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
)

// onto makes an overlay of an image and returns its path.
func onto(t *testing.T, below string, format chain.Format, blocks int64) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "overlay.qcow2")
	must(t, chain.CreateOverlay(path, below, format, blocks*names.BlockSize))
	return path
}

// write writes blocks of a disk as its device does, from pages of memory.
func (r *rig) write(t *testing.T, o *DiskObserver, block int64, gfns ...memory.GFN) {
	t.Helper()
	io := r.request(t, block, gfns...)
	o.BeforeWrite(io)
	var bufs [][]byte
	for _, b := range io.Buffers {
		bufs = append(bufs, b.Data)
	}
	must(t, o.chain.WriteAtv(bufs, io.Offset))
	o.AfterWrite(io, nil)
}

// pass names all of memory.
func (r *rig) pass(t *testing.T) *names.Map {
	t.Helper()
	p := names.Pass{Space: r.space, Table: r.Table(), Layers: r.Table().Layers()}
	m, err := p.Run(t.Context())
	must(t, err)
	return m
}

// TestChainIndexes: pages are named by whatever layer of a chain has an index,
// the lowest first, and by what the guest reads through the top.
func TestChainIndexes(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	base, content := image(t, 64)
	buildIndex(t, base, index.Beside(base))
	middle := onto(t, base, chain.Raw, 64)
	c, err := chain.Open(middle, chain.Options{})
	must(t, err)
	block := slices.Repeat([]byte("new "), names.BlockSize/4)
	must(t, errors.Join(c.WriteAtv([][]byte{block}, 9*names.BlockSize), c.Close()))
	c, err = chain.Open(middle, chain.Options{ReadOnly: true})
	must(t, err)
	built, err := index.Build(t.Context(), c.Layers()[0], index.Beside(middle), index.Options{})
	must(t, errors.Join(err, c.Close()))
	o := r.add(t, onto(t, middle, chain.Qcow2, 64), chain.Options{Format: chain.Qcow2})
	if log := r.log.String(); log != "" {
		t.Errorf("log: %s", log)
	}

	copy(r.view(t, 100), content[7*names.BlockSize:])
	copy(r.view(t, 101), block)
	m := r.pass(t)
	if got, want := m.At(100), names.OfBlock(0, 7); got&^(1<<60) != want {
		t.Errorf("a page of the base is %s, want %s", got, want)
	}
	if got, want := m.At(101), names.OfBlock(1, 9); got&^(1<<60) != want {
		t.Errorf("a page of the layer above is %s, want %s", got, want)
	}
	if o.Layer() != 2 {
		t.Errorf("the disk is layer %d", o.Layer())
	}
	sources := r.Sources()
	if len(sources) != 3 || sources[1].ID != built.LayerID || sources[1].ID.Kind() != layer.Content || sources[2].ID.Kind() != layer.Written {
		t.Errorf("layers %+v", sources)
	}
	if d, ok := sources[1].Digest(9); !ok || d != layer.Sum(block) {
		t.Error("the digest of a block is not the index's")
	}
	if sources[2].Digest != nil {
		t.Error("a layer without an index has digests")
	}
	// Who holds what, from the top.
	for _, tc := range []struct {
		block, n uint64
		in       names.LayerID
		blocks   uint64
	}{{0, 5, 1, 5}, {7, 1, 1, 1}, {9, 1, 1, 1}, {16, 40, 0, 40}} {
		in, n, err := sources[2].Lower(tc.block, tc.n)
		if err != nil || in != tc.in || n != tc.blocks {
			t.Errorf("%d blocks from %d on are in layer %d for %d, %v; want %d for %d", tc.n, tc.block, in, n, err, tc.in, tc.blocks)
		}
	}
}

// TestStacked: a disk that is frozen keeps its names, what comes later is the new
// top's, and when that is undone nothing false is left.
func TestStacked(t *testing.T) {
	for _, format := range []chain.Format{chain.Raw, chain.Qcow2} {
		t.Run(string(format), func(t *testing.T) {
			r := newRig(t, memory.TrackerWPAsync)
			path, content := image(t, 64)
			o := (*DiskObserver)(nil)
			if format == chain.Qcow2 {
				path = onto(t, path, chain.Raw, 64)
			}
			buildAny(t, path)
			o = r.add(t, path, chain.Options{Format: format})
			old := o.Layer()
			r.read(t, o, content, 20, 100, 101, 102)
			r.write(t, o, 30, 101)
			top := onto(t, path, format, 64)
			must(t, o.chain.Stack(top))
			must(t, o.Stacked())
			if l := r.Table().Layers()[old]; !l.Immutable || l.Index != nil {
				t.Errorf("the frozen layer is immutable: %t, with an index of what it was: %t", l.Immutable, l.Index != nil)
			}
			if o.Layer() == old {
				t.Fatal("the new top has no number of its own")
			}
			// The frozen block is what it was, whatever is written over it.
			copy(r.view(t, 105), content)
			r.write(t, o, 20, 105)
			r.read(t, o, content, 40, 106)
			for gfn, want := range map[memory.GFN]names.Name{
				100: names.OfBlock(old, 20), 101: names.OfBlock(old, 30), 102: names.OfBlock(old, 22),
				105: names.OfBlock(o.Layer(), 20), 106: names.OfBlock(o.Layer(), 40),
			} {
				if got := r.Table().At(gfn); got != want {
					t.Errorf("page %s is %s, want %s", gfn, got, want)
				}
			}
			m := r.pass(t)
			if got := m.At(100); got.Kind() != names.Block || got.Layer() != old {
				t.Errorf("a page of the frozen disk is %s", got)
			}
			frozen := r.Sources()[old]
			if stamp, err := frozen.Stamped(); err != nil || stamp == (snapshot.Stamp{}) {
				t.Errorf("stamp %+v, %v", stamp, err)
			}
			if _, err := r.Sources()[o.Layer()].Stamped(); err == nil {
				t.Error("a disk that is written has a stamp")
			}

			undone := o.Layer()
			must(t, o.chain.Unstack())
			o.Unstacked()
			if o.Layer() != old || r.Table().Layers()[old].Immutable {
				t.Errorf("the disk is layer %d, immutable %t", o.Layer(), r.Table().Layers()[old].Immutable)
			}
			for _, gfn := range []memory.GFN{100, 101, 102, 105, 106} {
				if got := r.Table().At(gfn); got != 0 {
					t.Errorf("page %s is %s after what was written was merged", gfn, got)
				}
			}
			for _, l := range r.Sources() {
				if l.Names == undone {
					t.Error("the layer that is gone is declared")
				}
			}
			r.read(t, o, content, 50, 107)
			if got := r.Table().At(107); got != names.OfBlock(old, 50) {
				t.Errorf("a page that was read later is %s", got)
			}
			if r.Changed() || r.log.String() != "" {
				t.Errorf("something changed; log: %s", r.log.String())
			}
		})
	}
}

// buildAny indexes an image of any format.
func buildAny(t *testing.T, path string) {
	t.Helper()
	c, err := chain.Open(path, chain.Options{ReadOnly: true})
	must(t, err)
	_, err = index.Build(t.Context(), c.Layers()[0], index.Beside(path), index.Options{})
	must(t, errors.Join(err, c.Close()))
}

// TestIdentify: a layer keeps the identity that it had, but not against its index.
func TestIdentify(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	base, _ := image(t, 64)
	buildIndex(t, base, index.Beside(base))
	o := r.add(t, onto(t, base, chain.Raw, 64), chain.Options{Format: chain.Qcow2})
	was, own := layer.NewWritten(), r.Sources()
	r.Identify(0, was)
	r.Identify(o.Layer(), was)
	r.Identify(o.Layer(), layer.ID{1}) // which is none
	r.Identify(77, was)
	now := r.Sources()
	if now[0].ID != own[0].ID || now[o.Layer()].ID != was {
		t.Errorf("identities %s and %s", now[0].ID, now[o.Layer()].ID)
	}
}

// TestFrozenChanged: a frozen disk that somebody changes all the same is noticed,
// and has no stamp for a snapshot.
func TestFrozenChanged(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	path, content := image(t, 64)
	o := r.add(t, path, chain.Options{})
	r.read(t, o, content, 20, 100)
	must(t, o.chain.Freeze())
	o.Frozen()
	if r.Changed() {
		t.Error("it changed by being frozen")
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	if _, err := f.WriteAt([]byte{1}, 5000); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Sources()[o.Layer()].Stamped(); !errors.Is(err, ErrChanged) {
		t.Errorf("%v", err)
	}
	if !r.Changed() || r.Changed() {
		t.Error("the change was not noticed, or twice")
	}
	if got := r.Table().At(100); got != 0 || !strings.Contains(r.log.String(), path) {
		t.Errorf("page 100 is %s; log: %s", got, r.log.String())
	}
	// A disk that may be written changes, and nobody minds.
	r = newRig(t, memory.TrackerNone)
	path, _ = image(t, 64)
	o = r.add(t, path, chain.Options{})
	must(t, o.chain.Freeze())
	o.Frozen()
	must(t, o.chain.Thaw())
	o.Thawed()
	r.write(t, o, 3, 7)
	if r.Changed() {
		t.Errorf("a change by the guest was told: %s", r.log.String())
	}
}

// TestDeclare: layers of disks without names, so that they are found again.
func TestDeclare(t *testing.T) {
	base, _ := image(t, 64)
	top := onto(t, base, chain.Raw, 64)
	c, err := chain.Open(top, chain.Options{})
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	path, content := image(t, 3)
	sources, err := Declare([]*boot.Image{{Name: path, Reader: bytes.NewReader(content), Size: int64(len(content))}}, c)
	must(t, err)
	if l := sources[0]; l.Path != path || l.Size != int64(len(content)) || l.Format != "raw" || l.Stamped != nil {
		t.Errorf("the kernel: %+v", l.Layer)
	}
	var got []string
	for _, s := range sources[1:] {
		got = append(got, s.Path+" "+s.Format)
		if stamp, err := s.Stamped(); err != nil || stamp.Size != s.Size || s.ID.Kind() != layer.Written {
			t.Errorf("%s: stamp %+v, %v; identity %s", s.Path, stamp, err, s.ID)
		}
	}
	if diff := cmp.Diff([]string{top + " qcow2", base + " raw"}, got); diff != "" {
		t.Error(diff)
	}
}
