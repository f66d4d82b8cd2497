package main

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestExportImport: a machine that was saved goes on from one file, when nothing
// else of it is left, and can be saved again.
func TestExportImport(t *testing.T) {
	s := newSaveHome(t, "w", "32M", "size=8M,words=16,order=random,seed=6")
	first, second := filepath.Join(s.dir, "first"), filepath.Join(s.dir, "second")
	s.want("snapshot", "w", first)
	s.want("snapshot", "w", second, "--parent", first, "--stop")
	if out := s.want("snapshot", "inspect", second); strings.Count(out, "unchanged") != 2 || !strings.Contains(out, "pages of the parent") {
		t.Errorf("%s", out)
	}
	away := t.TempDir()
	file := filepath.Join(away, "w.ditto")
	s.want("snapshot", "export", second, file)
	if err := errors.Join(os.RemoveAll(s.dir), os.Mkdir(s.dir, 0o700)); err != nil {
		t.Fatal(err)
	}
	there := filepath.Join(s.dir, "there")
	s.want("snapshot", "import", file, there)
	s.want("snapshot", "verify", filepath.Join(there, "second"))
	for _, name := range []string{"second", "first"} {
		s.want("restore", filepath.Join(there, name), "-d")
		if s.writes("w") == 0 {
			t.Error("the restored guest does not know what it wrote")
		}
		third := filepath.Join(s.dir, "after-"+name)
		s.want("snapshot", "w", third, "--parent", filepath.Join(there, name))
		s.want("snapshot", "verify", third)
		s.finish("w")
	}
	s.nothingLeft()
}
