package chain

import (
	"bytes"
	"context"
	"errors"
	"math/rand"
	"os"
	"path/filepath"
	"testing"
)

// TestConvert flattens a chain to both formats.
func TestConvert(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	rng := rand.New(rand.NewSource(1))
	w := twin{model: makeBase(t, at("base"), rng, 4<<20)}
	if err := CreateOverlay(at("top"), at("base"), Raw, 4<<20); err != nil {
		t.Fatal(err)
	}
	w.c = openChain(t, at("top"), Options{})
	for range 60 {
		if err := w.step(rng); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	for _, format := range []Format{Raw, Qcow2} {
		out := at("out-" + string(format))
		if err := Convert(ctx, w.c, out, format, nil); err != nil {
			t.Fatal(err)
		}
		if err := Convert(ctx, w.c, out, format, nil); !errors.Is(err, os.ErrExist) {
			t.Errorf("an image was overwritten: %v", err)
		}
		(&twin{c: openChain(t, out, Options{}), model: w.model}).compare(t)
	}
	cancel()
	if err := Convert(ctx, w.c, at("late"), Raw, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if left, _ := filepath.Glob(at("*late*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
	w.compare(t)
}

// TestCommit merges an overlay into a shorter image of each format.
func TestCommit(t *testing.T) {
	for _, format := range []Format{Raw, Qcow2} {
		dir := t.TempDir()
		base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
		rng := rand.New(rand.NewSource(1))
		tool(t, "qemu-img", "create", "-q", "-f", string(format), base, "3M")
		if err := CreateOverlay(top, base, format, 4<<20); err != nil {
			t.Fatal(err)
		}
		w := twin{c: openChain(t, top, Options{}), model: make([]byte, 4<<20)}
		for range 100 {
			if err := w.step(rng); err != nil {
				t.Fatal(err)
			}
		}
		if err := w.c.Close(); err != nil {
			t.Fatal(err)
		}
		if below, err := Commit(top); err != nil || below != base {
			t.Fatalf("commit to %q: %v", below, err)
		}
		for _, path := range []string{base, top} {
			c := openChain(t, path, Options{ReadOnly: true})
			if !bytes.Equal(readAll(t, c), w.model) {
				t.Errorf("%s reads as something else", path)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
			f := Qcow2
			if path == base {
				f = format
			}
			if f == Qcow2 {
				tool(t, "qemu-img", "check", "-f", "qcow2", path)
			}
		}
	}
}
