package naming

import (
	"os"
	"strings"
	"testing"
	"time"

	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// TestIndex: an index is used only if it is whole and the image's.
func TestIndex(t *testing.T) {
	for _, tc := range []struct {
		name   string
		damage func(t *testing.T, path, at string)
		used   bool
		says   string // in the log
	}{
		{"fits", func(*testing.T, string, string) {}, true, ""},
		{"none", func(t *testing.T, _, at string) { must(t, os.Remove(at)) }, false, ""},
		{"truncated", func(t *testing.T, _, at string) { must(t, os.Truncate(at, 6000)) }, false, "index"},
		{"empty", func(t *testing.T, _, at string) { must(t, os.Truncate(at, 0)) }, false, "too few"},
		{"altered", func(t *testing.T, _, at string) { flip(t, at, 5000) }, false, "altered"},
		{"foreign", func(t *testing.T, _, at string) {
			other, _ := image(t, 70)
			must(t, os.Remove(at))
			buildIndex(t, other, at)
		}, false, "stale"},
		{"stale", func(t *testing.T, path, _ string) { flip(t, path, 5000) }, false, "stale"},
		{"a directory", func(t *testing.T, _, at string) {
			must(t, os.Remove(at))
			must(t, os.Mkdir(at, 0o700))
		}, false, "index"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			path, _ := image(t, 64)
			at := index.Beside(path)
			buildIndex(t, path, at)
			tc.damage(t, path, at)
			r := newRig(t, memory.TrackerNone)
			o := r.add(t, path, chain.Options{ReadOnly: true})
			if used := r.Table().Layers()[o.Layer()].Index != nil; used != tc.used {
				t.Errorf("the index is used: %t", used)
			}
			log := r.log.String()
			if tc.says == "" {
				if log != "" {
					t.Errorf("log: %s", log)
				}
				return
			}
			if strings.Count(log, "WARN") != 1 || !strings.Contains(log, tc.says) || !strings.Contains(log, "ditto image index "+path) {
				t.Errorf("log: %s", log)
			}
		})
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// flip changes one bit of a file.
func flip(t *testing.T, path string, off int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	must(t, err)
	defer f.Close()
	var b [1]byte
	_, err = f.ReadAt(b[:], off)
	must(t, err)
	b[0] ^= 0x10
	_, err = f.WriteAt(b[:], off)
	must(t, err)
}

// TestChangedBehind: names of a file that was changed although it is immutable
// are dropped before anybody uses them, and it is said once.
func TestChangedBehind(t *testing.T) {
	r := newRig(t, memory.TrackerWPAsync)
	path, content := image(t, 64)
	kernelPath, kernelContent := image(t, 65)
	kernel, err := boot.OpenImage(kernelPath)
	must(t, err)
	defer kernel.Close()
	o := r.add(t, path, chain.Options{ReadOnly: true})
	must(t, r.AddFile(boot.SourceKernel, kernel))
	r.Start()
	r.read(t, o, content, 7, 100, 101)
	copy(r.view(t, 200), kernelContent)
	r.Loaded([]boot.FileRange{{Source: boot.SourceKernel, GPA: 200 << 12, Offset: 0, Size: 4096}})
	for r.Stats().NamedProven < 3 {
		time.Sleep(time.Millisecond)
	}
	r.Stop()
	must(t, r.Settle(t.Context()))
	if n := r.Stats().NamedProven; n != 3 {
		t.Fatalf("%d pages are proven", n)
	}
	flip(t, path, 7*names.BlockSize)
	for range 3 {
		must(t, r.Settle(t.Context()))
	}
	for gfn, want := range map[memory.GFN]bool{100: false, 101: false, 200: true} {
		if got := r.Table().At(gfn); got.Proven() != want {
			t.Errorf("page %s is %s, proven %t", gfn, got, got.Proven())
		}
	}
	r.read(t, o, content, 9, 300)
	if got := r.Table().At(300); got != 0 {
		t.Errorf("a page is named after the changed file: %s", got)
	}
	if log := r.log.String(); strings.Count(log, "WARN") != 1 || !strings.Contains(log, path) {
		t.Errorf("log: %s", log)
	}
}

// TestIndexChangedInUse: an index that is cut short or altered while it is in use
// names nothing any more, ends no process, and is told of once.
func TestIndexChangedInUse(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, at string){
		"cut short": func(t *testing.T, at string) { must(t, os.Truncate(at, 0)) },
		"altered":   func(t *testing.T, at string) { flip(t, at, 5000) },
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t, memory.TrackerNone)
			path, content := image(t, 64)
			buildIndex(t, path, index.Beside(path))
			o := r.add(t, path, chain.Options{ReadOnly: true})
			layers := r.Table().Layers()
			copy(r.view(t, 100), content[5*names.BlockSize:][:names.BlockSize])
			pass := names.Pass{Space: r.space, Table: r.Table(), Layers: layers}
			found, err := pass.Run(t.Context())
			must(t, err)
			if got := found.At(100); got.Kind() != names.Block || got.Number() != 5 || r.CheckIndexes() {
				t.Fatalf("with a whole index the page is %s", got)
			}
			change(t, index.Beside(path))
			if name == "cut short" {
				if found, err = pass.Run(t.Context()); err != nil || found.At(100) != 0 {
					t.Errorf("without its bytes: %s, %v", found.At(100), err)
				}
			}
			if !r.CheckIndexes() || r.CheckIndexes() {
				t.Error("the change was not noticed, or twice")
			}
			if found, err = pass.Run(t.Context()); err != nil || found.At(100) != 0 {
				t.Errorf("a look that had begun earlier: %s, %v", found.At(100), err)
			}
			if r.Table().Layers()[o.Layer()].Index != nil {
				t.Error("the index is still offered")
			}
			if log := r.log.String(); strings.Count(log, "WARN") != 1 || !strings.Contains(log, index.Beside(path)) {
				t.Errorf("log: %s", log)
			}
		})
	}
}
