package snapshot

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/memory"
)

// small is a snapshot of 1 MiB with every kind of run, and a place in pages that
// belongs to no page any more.
func small(t *testing.T, c Compression) (*scene, string) {
	t.Helper()
	s := newSceneIn(t, quickDir(t), 1, 1<<20)
	for gfn := range memory.GFN(framePages) {
		s.fill(s.page(gfn)[:50]) // most of a compressed page is short
	}
	w := s.create("snap", s.options(c))
	early := s.space.NewPageSet()
	early.Add(0, framePages*memory.PageSize)
	if c == None {
		early.Remove(0, (framePages-1)*memory.PageSize)
	}
	if err := w.AddPages(context.Background(), early); err != nil {
		t.Fatal(err)
	}
	for gfn := range memory.GFN(framePages) {
		clear(s.page(gfn))
	}
	s.fill(s.page(100)[:1000])
	copy(s.page(101), s.page(100))
	for i, block := range []int{0, 1, 3, 2} {
		copy(s.page(102+memory.GFN(i)), s.content[block*memory.PageSize:])
	}
	s.finish(w, Capture{Map: s.pass(false)})
	return s, filepath.Join(s.dir, "snap")
}

// notices returns what Open, Load or Verify say.
func notices(t *testing.T, dir string, load bool) error {
	snap, err := Open(dir, OpenOptions{})
	if err != nil {
		return err
	}
	defer snap.Close()
	if load {
		if err := snap.Load(context.Background(), newSpace(t, snap.m.Memory.Size), LoadOptions{}); err != nil {
			return err
		}
	}
	return snap.Verify(context.Background(), LoadOptions{})
}

// filesOf lists the files of a snapshot.
func filesOf(t *testing.T, dir string) []string {
	t.Helper()
	var files []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			files = append(files, path)
		}
		return err
	})
	if err != nil || len(files) != 5 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	return files
}

// TestEveryByte alters each byte of each file in turn.
func TestEveryByte(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		t.Run(string(c), func(t *testing.T) {
			_, dir := small(t, c)
			if err := notices(t, dir, true); err != nil {
				t.Fatal(err)
			}
			opened, err := Open(dir, OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			defer opened.Close()
			for _, path := range filesOf(t, dir) {
				f, err := os.OpenFile(path, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				info, _ := f.Stat()
				var was, now [1]byte
				for at := range info.Size() {
					f.ReadAt(was[:], at)
					now[0] = was[0] ^ 1<<(at%8)
					f.WriteAt(now[:], at)
					var err error
					if filepath.Base(path) == PagesName { // Open looks only at its size
						err = opened.Verify(context.Background(), LoadOptions{Workers: 1})
					} else {
						err = notices(t, dir, false)
					}
					if err == nil {
						t.Fatalf("%s: byte %d: nobody noticed that %#x became %#x", path, at, was[0], now[0])
					}
					f.WriteAt(was[:], at)
				}
			}
			if err := notices(t, dir, true); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestLoadNotices: whoever loads without verifying gets no altered page.
func TestLoadNotices(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		_, dir := small(t, c)
		snap, err := Open(dir, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(filepath.Join(dir, PagesName), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, _ := snap.resolve(100)
		at := int64(r.Number) * memory.PageSize
		if c == Zstd {
			at = int64(snap.p.frames[r.Number/framePages].offset) + 20
		}
		f.WriteAt([]byte{0xff}, at)
		if err := snap.Load(context.Background(), newSpace(t, 1<<20), LoadOptions{}); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: load: %v", c, err)
		}
		reader := snap.NewReader()
		if err := reader.ReadPage(100, make([]byte, memory.PageSize)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: read: %v", c, err)
		}
		reader.Close()
		snap.Close()
	}
}

// TestDigestsNotice: digests that Open does not read are proven when they are
// wanted.
func TestDigestsNotice(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		_, dir := small(t, c)
		path := filepath.Join(dir, PageMapName)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		b[len(b)-1] ^= 1
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
		snap, err := Open(dir, OpenOptions{})
		if err != nil {
			t.Fatalf("%s: the end of the page map was read to open it: %v", c, err)
		}
		if err := snap.Load(context.Background(), newSpace(t, 1<<20), LoadOptions{}); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: load: %v", c, err)
		}
		if err := snap.Verify(context.Background(), LoadOptions{}); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: verify: %v", c, err)
		}
		reader := snap.NewReader()
		if err := reader.ReadPage(100, make([]byte, memory.PageSize)); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: read: %v", c, err)
		}
		reader.Close()
		snap.Close()
	}
}

// TestTruncated cuts each file at each length that means something, and removes
// it.
func TestTruncated(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		_, dir := small(t, c)
		for _, path := range filesOf(t, dir) {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for _, n := range []int{0, 1, headerSize - 1, headerSize, headerSize + runSize, memory.PageSize, len(b) / 2, len(b) - 1, len(b) + 1} {
				if n < 0 || n == len(b) || n > len(b)+1 {
					continue
				}
				os.Truncate(path, int64(n))
				if err := notices(t, dir, false); !errors.Is(err, ErrFormat) {
					t.Errorf("%s of %d bytes, cut to %d: %v", path, len(b), n, err)
				}
				os.WriteFile(path, b, 0o600)
			}
			os.Remove(path)
			if err := notices(t, dir, false); !errors.Is(err, ErrFormat) {
				t.Errorf("without %s: %v", path, err)
			}
			os.Mkdir(path, 0o700)
			if err := notices(t, dir, false); err == nil {
				t.Errorf("%s is a folder, and nobody noticed", path)
			}
			os.Remove(path)
			os.WriteFile(path, b, 0o600)
		}
		if err := notices(t, dir, true); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSymlink: a snapshot does not lead out of its folder.
func TestSymlink(t *testing.T) {
	s, dir := small(t, None)
	pages := filepath.Join(dir, PagesName)
	away := filepath.Join(s.dir, "away")
	os.Rename(pages, away)
	os.Symlink(away, pages)
	if err := notices(t, dir, false); err == nil {
		t.Error("pages outside of the snapshot were read")
	}
}

func TestNewerVersion(t *testing.T) {
	_, dir := small(t, None)
	for _, name := range []string{ManifestName, PageMapName} {
		path := filepath.Join(dir, name)
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if name == ManifestName {
			newer := strings.Replace(string(b), `"format": 1`, `"format": 2, "more": {}`, 1)
			os.WriteFile(path, []byte(newer), 0o600)
			_, err = Open(dir, OpenOptions{})
			os.WriteFile(path, b, 0o600)
		} else {
			b[offVersion] = 2
			_, _, err = readHeader(b, mapScope{regions: []memory.Range{{Size: 1 << 20}}})
		}
		if !errors.Is(err, ErrVersion) || errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestLayerChanged: each byte of a block that a page is named by counts, others
// do not.
func TestLayerChanged(t *testing.T) {
	s, dir := small(t, None)
	b := append([]byte(nil), s.content...)
	for at := 0; at < 6*memory.PageSize; at += 511 {
		b[at] ^= 4
		os.WriteFile(s.path, b, 0o600)
		b[at] ^= 4
		err := notices(t, dir, true)
		named := at < 4*memory.PageSize
		if named != errors.Is(err, ErrLayer) || !named && err != nil {
			t.Errorf("byte %d of the layer: %v", at, err)
		}
		snap, err := Open(dir, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := snap.Plan(context.Background(), PlanOptions{}); named != errors.Is(err, ErrLayer) || !named && err != nil {
			t.Errorf("byte %d of the layer: plan: %v", at, err)
		}
		snap.Close()
	}
	os.WriteFile(s.path, s.content[:5*memory.PageSize], 0o600)
	if err := notices(t, dir, true); !errors.Is(err, ErrLayer) {
		t.Errorf("a shorter layer: %v", err)
	}
	os.Remove(s.path)
	if err := notices(t, dir, true); !errors.Is(err, ErrLayer) || !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no layer: %v", err)
	}
	snap := s.open("snap")
	if _, err := snap.Plan(context.Background(), PlanOptions{}); !errors.Is(err, ErrLayer) {
		t.Errorf("plan without the layer: %v", err)
	}
}

// TestRemovedWhileOpen: a snapshot that is open stays whole, though its folder
// goes; of its layers those that were read.
func TestRemovedWhileOpen(t *testing.T) {
	for _, c := range []Compression{None, Zstd} {
		s, dir := small(t, c)
		snap, err := Open(dir, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if err := Remove(dir); err != nil {
			t.Fatal(err)
		}
		if err := snap.Verify(context.Background(), LoadOptions{}); err != nil {
			t.Errorf("%s: %v", c, err)
		}
		os.Remove(s.path)
		s.checkLoad(snap)
		if _, err := Open(dir, OpenOptions{}); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: open once more: %v", c, err)
		}
		snap.Close()
	}
}

// TestTruncatedWhileOpen: what is cut short after it was opened is noticed when it
// is read.
func TestTruncatedWhileOpen(t *testing.T) {
	for _, name := range []string{PagesName, PageMapName} {
		_, dir := small(t, None)
		snap, err := Open(dir, OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		os.Truncate(filepath.Join(dir, name), 0)
		if err := snap.Verify(context.Background(), LoadOptions{}); err == nil {
			t.Errorf("%s: nobody noticed", name)
		}
		if err := snap.Load(context.Background(), newSpace(t, snap.m.Memory.Size), LoadOptions{}); err == nil {
			t.Errorf("%s: it was loaded", name)
		}
		snap.Close()
	}
}
