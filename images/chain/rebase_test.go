package chain

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/images/disk"
)

// info is what qemu-img says of an image.
type info struct {
	Backing string `json:"backing-filename"`
	Format  string `json:"backing-filename-format"`
	Virtual int64  `json:"virtual-size"`
	Actual  int64  `json:"actual-size"`
}

func infoOf(tb testing.TB, path string) (out info) {
	tb.Helper()
	if err := json.Unmarshal([]byte(tool(tb, "qemu-img", "info", "--output=json", "-f", "qcow2", path)), &out); err != nil {
		tb.Fatal(err)
	}
	return out
}

// TestRebase stacks overlays of all kinds on other images and back: they read as
// before, to QEMU too.
func TestRebase(t *testing.T) {
	for _, o := range creations {
		if strings.HasPrefix(o, "preallocation") {
			continue
		}
		t.Run(o, func(t *testing.T) {
			t.Parallel()
			dir := t.TempDir()
			at := func(name string) string { return filepath.Join(dir, name) }
			rng := rand.New(rand.NewSource(1))
			const size = 8<<20 + 3*512
			// One is longer than the overlay, one shorter and not of whole sectors.
			long := makeBase(t, at("long"), rng, size+1<<20)
			short := bytes.Clone(long[:5<<20+100])
			rng.Read(short[1<<20 : 3<<20])
			clear(short[3<<20 : 3<<20+700<<10])
			if err := os.WriteFile(at("short"), short, 0o600); err != nil {
				t.Fatal(err)
			}
			tool(t, "qemu-img", "create", "-q", "-f", "qcow2", "-b", "short", "-F", "raw", at("middle"), fmt.Sprint(size-1<<20))
			args := []string{"create", "-q", "-f", "qcow2", "-b", "long", "-F", "raw"}
			if o != "" {
				args = append(args, "-o", o)
			}
			path := at("top")
			tool(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
			w := twin{model: bytes.Clone(long[:size])}
			for i, below := range []string{"long", "short", "middle", "", "long", "middle"} {
				if err := Rebase(context.Background(), path, maybe(dir, below), RebaseOptions{}); err != nil {
					t.Fatalf("onto %q: %v", below, err)
				}
				if got := infoOf(t, path); got.Backing != below || (got.Format != "") != (below != "") {
					t.Errorf("it should be on %q and is on %q, %q", below, got.Backing, got.Format)
				}
				w.c = openChain(t, path, Options{})
				for range 20 {
					if err := w.step(rng); err != nil {
						t.Fatalf("after %d: %v", i, err)
					}
				}
				w.compare(t)
			}
		})
	}
}

// maybe is a file in a folder, or none.
func maybe(dir, name string) string {
	if name == "" {
		return ""
	}
	return filepath.Join(dir, name)
}

// TestRebaseCopiesLittle: what two images have from a common ancestor is not
// copied, nor what they happen to agree in.
func TestRebaseCopiesLittle(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	rng := rand.New(rand.NewSource(1))
	model := makeBase(t, at("base"), rng, 16<<20)
	for _, c := range []struct{ path, below string }{{"a", "base"}, {"b", "base"}, {"top", "a"}} {
		format := Raw
		if c.below != "base" {
			format = Qcow2
		}
		if err := CreateOverlay(at(c.path), at(c.below), format, 16<<20); err != nil {
			t.Fatal(err)
		}
	}
	own := make([]byte, 128<<10)
	rng.Read(own)
	for name, content := range map[string][]byte{"a": own, "b": model[3<<20:][:128<<10]} {
		c := openChain(t, at(name), Options{})
		if err := errors.Join(c.WriteAtv([][]byte{content}, 3<<20), c.Close()); err != nil {
			t.Fatal(err)
		}
	}
	copy(model[3<<20:], own)
	var heard []int64
	if err := Rebase(context.Background(), at("top"), at("b"), RebaseOptions{Progress: func(done, _ int64) { heard = append(heard, done) }}); err != nil {
		t.Fatal(err)
	}
	if n := len(heard); n == 0 || heard[n-1] != 16<<20 {
		t.Errorf("progress: %v", heard)
	}
	if got := infoOf(t, at("top")); got.Actual > 1<<20 || got.Backing != "b" {
		t.Errorf("%+v", got)
	}
	(&twin{c: openChain(t, at("top"), Options{}), model: model}).compare(t)
}

// TestRebaseUnsafe changes the name and nothing else.
func TestRebaseUnsafe(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	rng := rand.New(rand.NewSource(1))
	makeBase(t, at("old"), rng, 1<<20)
	model := makeBase(t, at("new"), rng, 1<<20)
	if err := CreateOverlay(at("top"), at("old"), Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	onto := func(below string, o RebaseOptions) error {
		o.Unsafe = true
		return Rebase(context.Background(), at("top"), below, o)
	}
	if err := onto(at("gone"), RebaseOptions{}); !errors.Is(err, os.ErrNotExist) || strings.Contains(err.Error(), "\n") {
		t.Errorf("of an image that is not there the format cannot be found: %v", err)
	}
	// Also from one that is not there.
	for _, below := range []string{"gone", strings.Repeat("d/", 400) + "new", "new"} {
		if err := onto(at(below), RebaseOptions{Format: Raw}); err != nil {
			t.Fatal(err)
		}
		if got := infoOf(t, at("top")); got.Backing != below || got.Format != "raw" {
			t.Errorf("%+v", got)
		}
	}
	(&twin{c: openChain(t, at("top"), Options{}), model: model}).compare(t)
	if err := onto("", RebaseOptions{}); err != nil {
		t.Fatal(err)
	}
	(&twin{c: openChain(t, at("top"), Options{}), model: make([]byte, 1<<20)}).compare(t)
}

// TestRebaseRefuses what would make a circle, and what is in use.
func TestRebaseRefuses(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	rng := rand.New(rand.NewSource(1))
	model := makeBase(t, at("base"), rng, 4<<20)
	makeBase(t, at("base2"), rng, 4<<20)
	for _, c := range []struct {
		path, below string
		format      Format
	}{{"one", "base", Raw}, {"two", "one", Qcow2}} {
		if err := CreateOverlay(at(c.path), at(c.below), c.format, 4<<20); err != nil {
			t.Fatal(err)
		}
	}
	if err := Rebase(context.Background(), at("one"), at("two"), RebaseOptions{}); err == nil || !strings.Contains(err.Error(), "is below "+at("two")) {
		t.Errorf("a circle: %v", err)
	}
	used := openChain(t, at("two"), Options{})
	for _, c := range []struct {
		path, below, want string
		o                 RebaseOptions
	}{
		{"two", "two", "itself", RebaseOptions{}},
		{"two", "two", "itself", RebaseOptions{Unsafe: true}},
		{"two", "base", "in use", RebaseOptions{}},
		{"two", "base", "in use", RebaseOptions{Unsafe: true}},
		{"base2", "gone", "does not exist", RebaseOptions{}},
		{"base2", "base", "no qcow2 image", RebaseOptions{}},
		{"two", "gone", "does not exist", RebaseOptions{}},
	} {
		err := Rebase(context.Background(), at(c.path), at(c.below), c.o)
		var e *disk.Error
		if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s onto %s: %v", c.path, c.below, err)
		}
	}
	if err := used.Close(); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := Rebase(ctx, at("two"), "", RebaseOptions{}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
	if got := infoOf(t, at("two")); got.Backing != "one" {
		t.Errorf("cancelled, it is on %q", got.Backing)
	}
	(&twin{c: openChain(t, at("two"), Options{}), model: model}).compare(t)
}
