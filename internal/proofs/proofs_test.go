package proofs

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const table = `# Proofs

| claim | what | last figure |
|-------|------|-------------|
| boot-200 | 200 boots \| power-offs | none yet |
| ` + "`power-cut`" + ` | flushed data survives | old |

boot-200 is explained here.
`

func TestUpdate(t *testing.T) {
	got, err := Update(table, "boot-200", "0 leaks")
	if err != nil {
		t.Fatal(err)
	}
	got, err = Update(got, "power-cut", "20 of 20")
	if err != nil {
		t.Fatal(err)
	}
	want := `# Proofs

| claim | what | last figure |
|-------|------|-------------|
| boot-200 | 200 boots \| power-offs | 0 leaks |
| ` + "`power-cut`" + ` | flushed data survives | 20 of 20 |

boot-200 is explained here.
`
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("Update (-want +got):\n%s", diff)
	}
}

func TestUpdateErrors(t *testing.T) {
	if _, err := Update(table, "unknown", "x"); !errors.Is(err, ErrNoRow) {
		t.Errorf("unknown claim: %v, want ErrNoRow", err)
	}
	for _, figure := range []string{"a|b", "a\nb"} {
		if _, err := Update(table, "boot-200", figure); err == nil {
			t.Errorf("figure %q was accepted", figure)
		}
	}
}

func TestUpdateFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "proofs.md")
	if err := os.WriteFile(path, []byte(table), 0o644); err != nil {
		t.Fatal(err)
	}
	if err := UpdateFile(path, "boot-200", "12 ms"); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	want, err := Update(table, "boot-200", "12 ms")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("UpdateFile (-want +got):\n%s", diff)
	}
	if err := UpdateFile(path+".missing", "boot-200", "x"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
}

func FuzzUpdate(f *testing.F) {
	f.Add(table, "boot-200", "12 ms")
	f.Add("|a|b|c|", "a", `\`)
	f.Add(`|a|b|\|`, "a", "x")
	f.Fuzz(func(t *testing.T, text, id, figure string) {
		got, err := Update(text, id, figure)
		if err != nil {
			return
		}
		again, err := Update(got, id, figure)
		if err != nil {
			t.Fatalf("the row is lost after an update: %v\n%q", err, got)
		}
		if again != got {
			t.Fatalf("a second update changes %q to %q", got, again)
		}
	})
}
