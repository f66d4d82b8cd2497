package main

import (
	"os"
	"path/filepath"
	"testing"
)

// TestPagesAreCurrent: docs/cli says what the command says. If it fails, run
// make generate.
func TestPagesAreCurrent(t *testing.T) {
	const committed = "../../../../docs/cli"
	fresh := t.TempDir()
	if err := generate(fresh); err != nil {
		t.Fatal(err)
	}
	for _, pattern := range []string{"ditto*.md", "man/ditto*.1"} {
		want, err := filepath.Glob(filepath.Join(fresh, pattern))
		if err != nil {
			t.Fatal(err)
		}
		have, err := filepath.Glob(filepath.Join(committed, pattern))
		if err != nil || len(have) != len(want) || len(want) == 0 {
			t.Errorf("%s: %d pages, want %d, %v: run make generate", pattern, len(have), len(want), err)
		}
		for _, path := range want {
			name, err := filepath.Rel(fresh, path)
			if err != nil {
				t.Fatal(err)
			}
			a, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if b, err := os.ReadFile(filepath.Join(committed, name)); err != nil || string(a) != string(b) {
				t.Errorf("%s is out of date, %v: run make generate", name, err)
			}
		}
	}
}
