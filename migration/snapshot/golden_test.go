package snapshot

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/memory"
)

var update = flag.Bool("update", false, "write the golden snapshots of the current format anew")

// goldenScene is the memory of the golden snapshots: every kind of run.
func goldenScene(t *testing.T) *scene {
	s := newScene(t, 77, 1<<20)
	for gfn := memory.GFN(16); gfn < 19; gfn++ {
		s.fill(s.page(gfn)[:300])
	}
	copy(s.page(40), s.page(17))
	for i := range 70 { // more than one run has
		copy(s.page(100+memory.GFN(i)), s.content[(20+i)*memory.PageSize:])
	}
	return s
}

// writeGolden writes a snapshot, and one that adds to it.
func writeGolden(s *scene, c Compression) {
	base, child := string(c)+"-base", string(c)+"-child"
	s.save(base, s.options(c), Capture{Map: s.pass(false)})
	clear(s.page(16))
	s.fill(s.page(50)[:100])
	o := s.options(c)
	o.Parent, o.ParentPath = s.open(base), "../"+base
	s.save(child, o, Capture{Map: s.pass(false)})
}

// TestGolden: what was written once is read for ever, and the bytes that the
// current format gives do not change unnoticed. What zstd makes of pages may
// differ from one version of the library to the next.
func TestGolden(t *testing.T) {
	const kept = "testdata/golden1"
	for _, c := range []Compression{None, Zstd} {
		s := goldenScene(t)
		// The stamp of a file is not the same twice.
		s.unstamped = true
		writeGolden(s, c)
		if *update {
			for _, name := range []string{"-base", "-child"} {
				to := filepath.Join(kept, string(c)+name)
				if err := os.RemoveAll(to); err != nil {
					t.Fatal(err)
				}
				if err := os.CopyFS(to, os.DirFS(filepath.Join(s.dir, string(c)+name))); err != nil {
					t.Fatal(err)
				}
			}
		}
		find := func(string, Parent) (string, error) { return filepath.Join(kept, string(c)+"-base"), nil }
		raw := func(_ string, l Layer) (LayerFile, error) {
			l.Path = "disk.img"
			return OpenLayer(s.dir, l)
		}
		snap, err := Open(filepath.Join(kept, string(c)+"-child"), OpenOptions{OpenLayer: raw, FindParent: find})
		if err != nil {
			t.Fatal(err)
		}
		s.checkLoad(snap)
		if err := snap.Verify(t.Context(), LoadOptions{}); err != nil {
			t.Error(err)
		}
		snap.Close()
		if c == None {
			s.checkSameFiles(kept)
		}
	}
}

// checkSameFiles compares the snapshots just written with those kept.
func (s *scene) checkSameFiles(kept string) {
	for _, name := range []string{"none-base", "none-child"} {
		for _, file := range []string{ManifestName, PageMapName, PagesName, SectionsName + "/cpu"} {
			want, err := os.ReadFile(filepath.Join(kept, name, file))
			if err != nil {
				s.t.Fatal(err)
			}
			got, err := os.ReadFile(filepath.Join(s.dir, name, file))
			if err != nil {
				s.t.Fatal(err)
			}
			if !bytes.Equal(got, want) {
				s.t.Errorf("%s/%s is not what it was: a change of the format needs a new version", name, file)
			}
		}
	}
}
