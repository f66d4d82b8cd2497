package archive

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/chain"
	"ditto.vm/migration/snapshot"
)

// list returns the paths of all files below a folder.
func list(t testing.TB, dir string) []string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() {
			rel, _ := filepath.Rel(dir, path)
			all = append(all, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// elsewhere is where the scene's archives are imported, when nothing else of it is
// left.
func (s *scene) elsewhere() string {
	s.t.Helper()
	for _, name := range list(s.t, s.dir) {
		os.RemoveAll(s.at(strings.Split(name, "/")[0]))
	}
	return filepath.Join(quickDir(s.t), "there")
}

// TestRoundTrip: a snapshot restores on another machine from one file.
func TestRoundTrip(t *testing.T) {
	for _, c := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		s := newScene(t)
		s.two(c)
		before, err := os.ReadFile(filepath.Join(s.at("second"), snapshot.ManifestName))
		if err != nil {
			t.Fatal(err)
		}
		var heard []string
		o := Options{Ditto: "v1", Progress: func(step string, done, total uint64) {
			if done > total || total == 0 {
				t.Errorf("%s: %d of %d bytes", step, done, total)
			}
			if done == total {
				heard = append(heard, step)
			}
		}}
		file := filepath.Join(quickDir(t), "web.ditto")
		exported, err := ExportFile(context.Background(), s.at("second"), file, o)
		if err != nil {
			t.Fatal(err)
		}
		first, second := s.disks[1], s.disks[3]
		at := s.elsewhere()
		f, err := os.Open(file)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		r, err := Import(context.Background(), f, at, o)
		if err != nil {
			t.Fatal(err)
		}
		if heard = slices.Compact(heard); !slices.Equal(heard, []string{StepVerify, StepExport, StepImport, StepVerify}) {
			t.Errorf("steps: %v", heard)
		}
		want := Report{Snapshots: []string{filepath.Join(at, "second"), filepath.Join(at, "first")}, Images: 4, Bytes: exported.Bytes, Stored: exported.Stored}
		if d := cmp.Diff(want, r); d != "" {
			t.Error(d)
		}
		s.checkLoad(filepath.Join(at, "second"))
		after, err := os.ReadFile(filepath.Join(at, "second", snapshot.ManifestName))
		if err != nil || !bytes.Equal(after, before) {
			t.Errorf("the manifest is another, %v", err)
		}
		if b, err := os.ReadFile(filepath.Join(at, "first", snapshot.WorkingSet)); err != nil || string(b) != "0 1 2" {
			t.Errorf("working set %q, %v", b, err)
		}
		snap, err := snapshot.Open(filepath.Join(at, "second"), snapshot.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		defer snap.Close()
		for _, d := range []sceneDisk{first, second} {
			path, l, ok := snap.Locate(d.path)
			if !ok || l.ID != d.id {
				t.Fatalf("%s is at %s, %t", d.path, path, ok)
			}
			checkDisk(t, path, d)
		}
	}
}

// checkDisk compares an image that was imported with what a guest read from it,
// and stacks a new one on it.
func checkDisk(t *testing.T, path string, d sceneDisk) {
	t.Helper()
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o444 {
		t.Errorf("%s: mode %v, %v", path, info.Mode(), err)
	}
	c, err := chain.Open(path, chain.Options{ReadOnly: true, Format: d.format})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, c.Size())
	if err := c.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, d.content) {
		t.Errorf("%s reads as something else, %v", path, err)
	}
	for _, l := range c.Layers() {
		if filepath.Dir(l.Path()) != filepath.Dir(path) {
			t.Errorf("%s is stacked on %s", path, l.Path())
		}
	}
}

// TestTar: an archive can be unpacked without ditto.
func TestTar(t *testing.T) {
	for _, tool := range []string{"tar", "zstd"} {
		if _, err := exec.LookPath(tool); err != nil {
			t.Skipf("%s is not installed; try: apt install tar zstd", tool)
		}
	}
	s := newScene(t)
	s.two(snapshot.None)
	dir := t.TempDir()
	cmd := exec.Command("tar", "--zstd", "-C", dir, "-xvf", "-")
	cmd.Stdin = bytes.NewReader(s.export("second"))
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	var want []string
	for _, name := range []string{"second", "first"} {
		for _, file := range []string{"manifest.json", "pagemap", "pages", "sections/cpu", "sections/rtc"} {
			want = append(want, name+"/"+file)
		}
	}
	want = append(want, "first/workingset")
	for _, n := range []int{0, 1, 3, 2} {
		d := s.disks[n]
		name := "layers/" + snapshot.LayerName(d.id, d.format)
		want = append(want, name)
		was, err := os.ReadFile(d.path)
		if err != nil {
			t.Fatal(err)
		}
		if is, err := os.ReadFile(filepath.Join(dir, name)); err != nil || !bytes.Equal(is, was) {
			t.Errorf("%s is not what %s is, %v", name, d.path, err)
		}
	}
	want = append(want, indexName)
	got := strings.Fields(string(out))
	slices.Sort(got)
	slices.Sort(want)
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

// TestSparse: holes stay holes, also those of zeros that were written.
func TestSparse(t *testing.T) {
	s := newScene(t)
	big := s.at("big.img")
	if err := errors.Join(os.WriteFile(big, make([]byte, 1<<20), 0o600), os.Truncate(big, 64<<20)); err != nil {
		t.Fatal(err)
	}
	s.disks = append(s.disks, sceneDisk{big, s.disks[0].id, chain.Raw, make([]byte, 64<<20)})
	s.rng.Read(s.page(1))
	s.save("snap", "", snapshot.None, 3)
	b := s.export("snap")
	if len(b) > 256<<10 {
		t.Errorf("an archive of %d bytes", len(b))
	}
	at := s.elsewhere()
	if _, err := Import(context.Background(), bytes.NewReader(b), at, Options{}); err != nil {
		t.Fatal(err)
	}
	all, err := snapshot.List(at)
	if err != nil || len(all) != 1 || all[0].Stored > 256<<10 {
		t.Errorf("%+v, %v", all, err)
	}
	path := filepath.Join(at, snapshot.LayersName, snapshot.LayerName(s.disks[3].id, chain.Raw))
	out, err := exec.Command("du", "-k", path).Output()
	if err != nil || strings.Fields(string(out))[0] != "0" {
		t.Errorf("%s, %v", out, err)
	}
}

// TestNothingIsLeft: whatever stops an export or an import, and however it is
// read, there is no debris and nothing is overwritten.
func TestNothingIsLeft(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	b := s.export("second")
	dir := quickDir(t)
	empty := func(what string) {
		t.Helper()
		if left := list(t, dir); len(left) > 0 {
			t.Errorf("%s left %v", what, left)
		}
	}
	for _, step := range []string{StepVerify, StepExport, StepImport} {
		ctx, cancel := context.WithCancel(context.Background())
		stop := Options{Progress: func(now string, _, _ uint64) {
			if now == step {
				cancel()
			}
		}}
		if step != StepImport {
			if _, err := ExportFile(ctx, s.at("second"), filepath.Join(dir, "file"), stop); !errors.Is(err, context.Canceled) {
				t.Errorf("export, cancelled at %s: %v", step, err)
			}
			empty("export")
		}
		ctx, cancel = context.WithCancel(context.Background())
		if step != StepExport {
			if _, err := Import(ctx, bytes.NewReader(b), filepath.Join(dir, "there"), stop); !errors.Is(err, context.Canceled) {
				t.Errorf("import, cancelled at %s: %v", step, err)
			}
			empty("import")
		}
		cancel()
	}
	taken := filepath.Join(dir, "taken")
	if err := os.WriteFile(taken, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ExportFile(context.Background(), s.at("second"), taken, Options{}); !errors.Is(err, snapshot.ErrExists) {
		t.Errorf("export over a file: %v", err)
	}
	if _, err := Import(context.Background(), bytes.NewReader(b), taken, Options{}); !errors.Is(err, snapshot.ErrExists) {
		t.Errorf("import over a file: %v", err)
	}
	if got, err := os.ReadFile(taken); err != nil || string(got) != "x" || len(list(t, dir)) != 1 {
		t.Errorf("%q, %v, %v", got, err, list(t, dir))
	}
}

// TestSweep: the debris of an import that was killed goes with the next one.
func TestSweep(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	b := s.export("first")
	dir := quickDir(t)
	dead := filepath.Join(dir, ".there.partial-999999999")
	if err := os.CopyFS(filepath.Join(dead, "web"), os.DirFS(s.at("first"))); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dead, snapshot.LayersName), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Import(context.Background(), bytes.NewReader(b), filepath.Join(dir, "there"), Options{}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(dead); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("debris: %v", err)
	}
}

// TestExportRefuses what could not be restored elsewhere.
func TestExportRefuses(t *testing.T) {
	s := newScene(t)
	s.two(snapshot.None)
	refuses := func(what string, want error) {
		t.Helper()
		if _, err := Export(context.Background(), s.at("second"), &bytes.Buffer{}, Options{}); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
	}
	writer, err := chain.Open(s.at("web.second.qcow2"), chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	refuses("a layer that is written", snapshot.ErrLayer)
	writer.Close()
	os.Rename(s.at("kernel"), s.at("moved"))
	refuses("a layer of the parent is missing", snapshot.ErrLayer)
	os.WriteFile(s.at("kernel"), make([]byte, 5*4096+77), 0o600)
	refuses("a layer of the parent is another", snapshot.ErrLayer)
	os.Rename(s.at("moved"), s.at("kernel"))
	refuses("nothing", nil)
	os.Rename(s.at("web.qcow2"), s.at("moved"))
	refuses("what a layer is stacked on is missing", snapshot.ErrLayer)
	os.Rename(s.at("moved"), s.at("web.qcow2"))
	os.Truncate(filepath.Join(s.at("first"), snapshot.PagesName), 4096)
	refuses("the parent is damaged", snapshot.ErrFormat)
	os.RemoveAll(s.at("first"))
	refuses("there is no parent", snapshot.ErrParent)
}

// TestUnused: a file that is gone is not missed unless pages are named by it.
func TestUnused(t *testing.T) {
	s := newScene(t)
	s.rng.Read(s.page(1))
	s.save("snap", "", snapshot.None, 0, 2)
	os.Remove(s.at("kernel"))
	b := s.export("snap")
	at := s.elsewhere()
	r, err := Import(context.Background(), bytes.NewReader(b), at, Options{})
	if err != nil || r.Images != 1 {
		t.Errorf("%+v, %v", r, err)
	}
	s.checkLoad(filepath.Join(at, "snap"))
}

func TestFolderNames(t *testing.T) {
	long := strings.Repeat("x", 250)
	got := folderNames([]string{"/a/web", "/b/web", "/c/.hidden", "/c/layers", "/d/web", "/" + long, "/a/ü b"})
	want := []string{"web", "web-2", "snapshot", "snapshot-2", "web-3", "snapshot-3", "ü b"}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}

var update = flag.Bool("update", false, "write the golden archive of the current format anew")

const goldenFile = "testdata/golden1.ditto"

// TestGolden: what was written once can be imported for ever.
func TestGolden(t *testing.T) {
	s := newScene(t)
	s.tiny()
	if *update {
		if err := errors.Join(os.MkdirAll("testdata", 0o755), os.WriteFile(goldenFile, s.export("child"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	at := s.elsewhere()
	r, err := Import(context.Background(), bytes.NewReader(b), at, Options{})
	if err != nil {
		t.Fatal(err)
	}
	want := Report{Snapshots: []string{filepath.Join(at, "child"), filepath.Join(at, "parent")}, Images: 2, Bytes: r.Bytes, Stored: uint64(len(b))}
	if d := cmp.Diff(want, r); d != "" {
		t.Error(d)
	}
	s.checkLoad(filepath.Join(at, "child"))
}
