package snapshot

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func paths(dir string, all []Entry) []string {
	var found []string
	for _, e := range all {
		rel, _ := filepath.Rel(dir, e.Path)
		found = append(found, rel)
	}
	return found
}

func TestStore(t *testing.T) {
	s := newScene(t, 90, 1<<20)
	s.fill(s.page(1))
	s.chain(3, None, false)
	os.MkdirAll(filepath.Join(s.dir, "deep", "er"), 0o700)
	os.Rename(filepath.Join(s.dir, "snap2"), filepath.Join(s.dir, "deep", "er", "snap2"))
	s.save("broken", s.options(None), Capture{})
	os.WriteFile(filepath.Join(s.dir, "broken", ManifestName), []byte("{}"), 0o600)
	w := s.create("unfinished", s.options(None))
	defer w.Abort()

	all, err := List(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := paths(s.dir, all); !slices.Equal(got, []string{"broken", "deep/er/snap2", "snap0", "snap1"}) {
		t.Errorf("found %v", got)
	}
	for _, e := range all {
		if broken := filepath.Base(e.Path) == "broken"; broken != (e.Err != nil) || broken != (e.Manifest == nil) || !broken && e.Stored == 0 {
			t.Errorf("%s: %v, %d bytes", e.Path, e.Err, e.Stored)
		}
	}
	if got := paths(s.dir, Dependents(all, all[2].ID)); !slices.Equal(got, []string{"snap1"}) {
		t.Errorf("on snap0 depend %v", got)
	}
	if _, err := List(filepath.Join(s.dir, "missing")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder that is not there: %v", err)
	}
	one, err := List(filepath.Join(s.dir, "snap0"))
	if err != nil || len(one) != 1 {
		t.Errorf("a snapshot by itself: %d, %v", len(one), err)
	}
}

func TestRemove(t *testing.T) {
	s := newScene(t, 91, 1<<20)
	s.fill(s.page(1))
	s.chain(3, None, false)
	at := func(name string) string { return filepath.Join(s.dir, name) }
	if err := Remove(at("snap0")); !errors.Is(err, ErrDependents) {
		t.Errorf("a parent: %v", err)
	}
	away := t.TempDir()
	os.Rename(at("snap2"), filepath.Join(away, "x"))
	if err := Remove(at("snap1"), away); !errors.Is(err, ErrDependents) {
		t.Errorf("a parent of one elsewhere: %v", err)
	}
	if err := Remove(filepath.Join(away, "x")); err != nil {
		t.Error(err)
	}
	for _, name := range []string{"snap1", "snap0"} {
		if err := Remove(at(name)); err != nil {
			t.Error(err)
		}
	}
	if names := left(t, s.dir); len(names) > 0 {
		t.Errorf("left: %v", names)
	}
	if err := Remove(at("snap0")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("one that is not there: %v", err)
	}
	// Some other program's folder.
	os.Mkdir(at("web"), 0o700)
	os.WriteFile(filepath.Join(at("web"), ManifestName), []byte("{}"), 0o600)
	os.WriteFile(filepath.Join(at("web"), "index.html"), nil, 0o600)
	if err := Remove(at("web")); err == nil {
		t.Error("what is no snapshot was removed")
	}
	// A folder of snapshots, and one in which something else is.
	s.save("snap", s.options(None), Capture{})
	os.Mkdir(at("folder"), 0o700)
	os.Rename(at("snap"), filepath.Join(at("folder"), "snap"))
	if err := Remove(at("folder")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a folder of snapshots: %v", err)
	}
	os.WriteFile(filepath.Join(at("folder"), ManifestName), []byte("{}"), 0o600)
	if err := Remove(at("folder")); err == nil {
		t.Error("a folder was removed with the snapshots in it")
	}
	// A snapshot that cannot be read can be removed.
	s.save("snap", s.options(None), Capture{})
	os.WriteFile(filepath.Join(at("snap"), ManifestName), []byte("{}"), 0o600)
	if err := Remove(at("snap")); err != nil {
		t.Error(err)
	}
}
