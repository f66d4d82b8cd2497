package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/layer"
)

// writeImage makes an image of random blocks with a hole.
func writeImage(t *testing.T, path string) {
	t.Helper()
	content := make([]byte, 5<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range content[:3<<20] {
		content[i] = byte(rng.Uint32())
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestImageIndex(t *testing.T) {
	h := newHost(t)
	image := filepath.Join(t.TempDir(), "base.img")
	writeImage(t, image)
	fail := func(want string, args ...string) {
		t.Helper()
		code, out, errs := h.do(append([]string{"image", "index"}, args...)...)
		if code != exit.Disk || out != "" || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 {
			t.Errorf("%v: code %d, %q, %q, want %q", args, code, out, errs, want)
		}
	}
	parsed := func(args ...string) (got imageIndex) {
		t.Helper()
		if err := json.Unmarshal([]byte(h.want(append([]string{"image", "index", "--json"}, args...)...)), &got); err != nil {
			t.Fatal(err)
		}
		return got
	}
	fail("has no index", "--check", image)
	first := parsed(image)
	if !first.Built || first.Blocks != 768 || first.Index != image+".dittoindex" || first.LayerBytes != 5<<20 || first.ReadBytes != 5<<20 {
		t.Errorf("%+v", first)
	}
	if out := h.want("image", "index", "--check", image); !strings.Contains(out, "768 blocks") || !strings.HasSuffix(out, ": fits\n") {
		t.Errorf("%q", out)
	}
	if again := parsed(image); again.Built || again.LayerID != first.LayerID {
		t.Errorf("an index that fits was built anew: %+v", again)
	}
	if again := parsed("--force", image); !again.Built || again.LayerID != first.LayerID {
		t.Errorf("%+v", again)
	}

	// Altered, stale, and whole again.
	if err := os.Truncate(first.Index, first.IndexBytes-1); err != nil {
		t.Fatal(err)
	}
	fail("not a usable index", "--check", image)
	writeImage(t, image)
	parsed(image)
	if err := os.WriteFile(image, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	fail("build it anew with: ditto image index "+image, "--check", image)
	if empty := parsed(image); !empty.Built || empty.Blocks != 0 || empty.LayerID == first.LayerID {
		t.Errorf("%+v", empty)
	}

	// An image that a machine writes, and what is none.
	writer, err := disk.Open(image, disk.Options{})
	if err != nil {
		t.Fatal(err)
	}
	fail("is in use by another process", image)
	if err := writer.Close(); err != nil {
		t.Fatal(err)
	}
	qcow2 := filepath.Join(t.TempDir(), "a.qcow2")
	if err := os.WriteFile(qcow2, append([]byte("QFI\xfb"), make([]byte, 508)...), 0o600); err != nil {
		t.Fatal(err)
	}
	fail("qcow2", qcow2)
	fail("/absent", "/absent")
}

// TestImageIndexOfAStack: an overlay is indexed as a guest reads it, and so has
// the identity of a raw image that reads the same.
func TestImageIndexOfAStack(t *testing.T) {
	h := newHost(t)
	dir := t.TempDir()
	base, top, flat := filepath.Join(dir, "base.img"), filepath.Join(dir, "top.qcow2"), filepath.Join(dir, "flat.img")
	writeImage(t, base)
	if err := chain.CreateOverlay(top, base, chain.Raw, 6<<20); err != nil {
		t.Fatal(err)
	}
	c, err := chain.Open(top, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	block := bytes.Repeat([]byte{7}, 4096)
	for _, at := range []int64{1 << 20, 4 << 20, 6<<20 - 4096} {
		if err := c.WriteAtv([][]byte{block}, at); err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(chain.Convert(t.Context(), c, flat, chain.Raw, nil), c.Close()); err != nil {
		t.Fatal(err)
	}
	ids := map[string]layer.ID{}
	for _, path := range []string{top, flat, base} {
		var got imageIndex
		if err := json.Unmarshal([]byte(h.want("image", "index", "--json", path)), &got); err != nil {
			t.Fatal(err)
		}
		ids[path] = got.LayerID
		h.want("image", "index", "--check", path)
	}
	if ids[top] != ids[flat] || ids[top] == ids[base] {
		t.Errorf("identities %v", ids)
	}
	// What is below belongs to it.
	now := time.Now()
	if err := os.Chtimes(base, now, now); err != nil {
		t.Fatal(err)
	}
	if code, _, errs := h.do("image", "index", "--check", top); code != exit.Disk || !strings.Contains(errs, "stale") {
		t.Errorf("code %d, %s", code, errs)
	}
}

// TestImageIndexInterrupted: Ctrl-C leaves what was done and says how to go on.
func TestImageIndexInterrupted(t *testing.T) {
	h := newHost(t)
	image := filepath.Join(t.TempDir(), "base.img")
	writeImage(t, image)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	var out, errs bytes.Buffer
	code := h.env(&out, &errs).Execute(ctx, []string{"image", "index", image})
	if code != exit.Disk || !strings.Contains(errs.String(), "interrupted after") || !strings.Contains(errs.String(), "goes on from there") {
		t.Errorf("code %d: %s", code, errs.String())
	}
	if _, err := os.Stat(image + ".dittoindex.partial"); err != nil {
		t.Error(err)
	}
	h.want("image", "index", image)
	if left, err := filepath.Glob(image + ".*"); err != nil || len(left) != 1 {
		t.Errorf("beside the image lie %v, %v", left, err)
	}
}

func TestHumanBytes(t *testing.T) {
	for n, want := range map[uint64]string{0: "0", 1000: "1000", 1024: "1KiB", 1688192: "1.6MiB", 3 << 30: "3GiB", 1<<40 + 1: "1.0TiB"} {
		if got := humanBytes(n); got != want {
			t.Errorf("%d: %s, want %s", n, got, want)
		}
	}
}
