package mkdisk

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

func needTool(t *testing.T, name string) string {
	t.Helper()
	p, err := findTool(name, "e2fsprogs")
	if err != nil {
		t.Skipf("%v", err)
	}
	return p
}

// tool runs a program of e2fsprogs and fails the test when it does.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(needTool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

func writeFile(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o640); err != nil {
		t.Fatal(err)
	}
}

func TestMakeRaw(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.img")
	d, err := Make(context.Background(), Options{Path: path, SizeBytes: 5<<20 + 1})
	if err != nil {
		t.Fatal(err)
	}
	if d.SizeBytes != 6<<20 || d.Format != Raw || d.AllocatedBytes > 1<<20 {
		t.Errorf("got %+v, want 6 MiB, raw and sparse", d)
	}
	if _, err := Make(context.Background(), Options{Path: path, SizeBytes: 1}); !errors.Is(err, ErrExists) {
		t.Errorf("second Make: %v, want ErrExists", err)
	}
	if d, err = Make(context.Background(), Options{Path: path, SizeBytes: 1 << 20, Overwrite: true}); err != nil || d.SizeBytes != 1<<20 {
		t.Errorf("overwrite: %+v, %v", d, err)
	}
}

func TestMakeExt4FromFolder(t *testing.T) {
	needTool(t, "mke2fs")
	src, out := t.TempDir(), t.TempDir()
	payload := bytes.Repeat([]byte("ditto is here \n"), 70000)
	writeFile(t, filepath.Join(src, "a/b/payload"), payload)
	for i := range 3000 {
		writeFile(t, filepath.Join(src, "many", fmt.Sprint(i)), []byte{1})
	}
	if err := os.Link(filepath.Join(src, "a/b/payload"), filepath.Join(src, "hardlink")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("a/b/payload", filepath.Join(src, "link")); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(out, "d.img")
	d, err := Make(context.Background(), Options{
		Path: path, Folder: src, Label: "data", SlackBytes: 1 << 20,
		UUID: "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f",
	})
	if err != nil {
		t.Fatal(err)
	}
	tool(t, "e2fsck", "-fn", path)
	super := tool(t, "dumpe2fs", "-h", path)
	for _, want := range []string{"Filesystem volume name:   data", "Block size:               4096", "7d3c2a4e-0f4b-4a8e-9a61-0b5a4c3d2e1f"} {
		if !strings.Contains(super, want) {
			t.Errorf("superblock lacks %q", want)
		}
	}
	dump := filepath.Join(out, "payload")
	tool(t, "debugfs", "-R", "dump /a/b/payload "+dump, path)
	got, err := os.ReadFile(dump)
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(got) != sha256.Sum256(payload) {
		t.Error("the file in the image differs from the folder's")
	}
	if ls := tool(t, "debugfs", "-R", "ls /many", path); !strings.Contains(ls, "2999") {
		t.Error("the image lacks a file of a large folder")
	}
	if d.SizeBytes > 40<<20 {
		t.Errorf("size is %d MiB for 13 MiB of blocks and 1 MiB of slack", d.SizeBytes>>20)
	}
	leftovers, _ := filepath.Glob(filepath.Join(out, ".*"))
	if len(leftovers) > 0 {
		t.Errorf("left behind: %v", leftovers)
	}
}

func TestMakeExt4TooSmall(t *testing.T) {
	needTool(t, "mke2fs")
	src, out := t.TempDir(), t.TempDir()
	writeFile(t, filepath.Join(src, "big"), bytes.Repeat([]byte{7}, 8<<20))
	path := filepath.Join(out, "d.img")
	writeFile(t, path, []byte("precious"))
	_, err := Make(context.Background(), Options{Path: path, Folder: src, SizeBytes: 4 << 20, Overwrite: true})
	if !errors.Is(err, ErrTooSmall) {
		t.Errorf("got %v, want ErrTooSmall", err)
	}
	if b, _ := os.ReadFile(path); string(b) != "precious" {
		t.Error("a failed Make changed the existing file")
	}
	if names, _ := os.ReadDir(out); len(names) != 1 {
		t.Errorf("left behind: %v", names)
	}
}

// TestComputedSizeFits fills file systems of many shapes with no slack to
// speak of: a computed size must hold the content at the first try.
func TestComputedSizeFits(t *testing.T) {
	needTool(t, "mke2fs")
	for _, tc := range []struct {
		name  string
		files int
		size  int
	}{
		{"empty", 0, 0}, {"tiny files", 2000, 1}, {"medium", 40, 300_001}, {"one large", 1, 30 << 20},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src, out := t.TempDir(), t.TempDir()
			for i := range tc.files {
				writeFile(t, filepath.Join(src, fmt.Sprint("d", i%7), fmt.Sprint(i)), bytes.Repeat([]byte{byte(i + 1)}, tc.size))
			}
			c, err := measure(context.Background(), src)
			if err != nil {
				t.Fatal(err)
			}
			o := Options{Path: filepath.Join(out, "d.img"), Folder: src, SizeBytes: computeSize(c, 1<<16)}
			if _, err := Make(context.Background(), o); err != nil {
				t.Error(err)
			}
		})
	}
}

func TestMakeRejects(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "file")
	writeFile(t, file, nil)
	img := filepath.Join(t.TempDir(), "d.img")
	for name, o := range map[string]Options{
		"no path":          {SizeBytes: 1},
		"no size":          {Path: img},
		"negative size":    {Path: img, SizeBytes: -1},
		"huge size":        {Path: img, SizeBytes: 17 << 40},
		"bad format":       {Path: img, SizeBytes: 1, Format: "zfs"},
		"raw with folder":  {Path: img, Folder: dir, Format: Raw},
		"long label":       {Path: img, SizeBytes: 1 << 20, Label: "seventeen letters"},
		"missing folder":   {Path: img, Folder: filepath.Join(dir, "nope")},
		"folder is a file": {Path: img, Folder: file},
		"inside folder":    {Path: filepath.Join(dir, "d.img"), Folder: dir},
		"replaces folder":  {Path: dir, SizeBytes: 1, Overwrite: true},
		"no parent":        {Path: filepath.Join(dir, "nope/d.img"), SizeBytes: 1},
	} {
		t.Run(name, func(t *testing.T) {
			if d, err := Make(context.Background(), o); err == nil {
				t.Errorf("made %+v", d)
			} else if strings.Contains(err.Error(), "\n") {
				t.Errorf("more than one line: %v", err)
			}
		})
	}
}

func TestFindToolNamesPackage(t *testing.T) {
	_, err := findTool("no-such-program", "some-package")
	if !errors.Is(err, ErrNoTool) || !strings.Contains(err.Error(), "some-package") {
		t.Errorf("got %v", err)
	}
}

func TestMakeStops(t *testing.T) {
	needTool(t, "mke2fs")
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	out := t.TempDir()
	_, err := Make(ctx, Options{Path: filepath.Join(out, "d.img"), Folder: t.TempDir()})
	if !errors.Is(err, context.Canceled) {
		t.Errorf("got %v, want Canceled", err)
	}
	if names, _ := os.ReadDir(out); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}
