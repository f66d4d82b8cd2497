package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"image/png"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/internal/memmap"
	"ditto.vm/memory"
	naming "ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/migration/snapshot/archive"
)

// savedScene is a folder with a frozen disk and snapshots that are named by it.
type savedScene struct {
	*host
	dir, disk string
	content   []byte
	// machineDisk is what the machine's configuration says.
	machineDisk string
	id          layer.ID
	space       *memory.Space
	index       *index.Index
}

func newSavedScene(t *testing.T) *savedScene {
	t.Helper()
	s := &savedScene{host: newHost(t), dir: t.TempDir(), content: make([]byte, 64<<12), id: layer.NewWritten()}
	rand.NewChaCha8([32]byte{1}).Read(s.content)
	s.disk = filepath.Join(s.dir, "disk.img")
	s.machineDisk = s.disk
	if err := os.WriteFile(s.disk, s.content, 0o444); err != nil {
		t.Fatal(err)
	}
	src, err := layer.OpenFile(s.disk)
	if err != nil {
		t.Fatal(err)
	}
	at := filepath.Join(t.TempDir(), "index")
	_, err = index.Build(context.Background(), src, at, index.Options{})
	if err := errors.Join(err, src.Close()); err != nil {
		t.Fatal(err)
	}
	if s.index, err = index.Open(at); err != nil {
		t.Fatal(err)
	}
	if s.space, err = memory.New(memory.Config{Size: 2 << 20}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(s.index.Close(), s.space.Close()); err != nil {
			t.Error(err)
		}
	})
	copy(s.page(1), s.content[:3*4096]) // three blocks
	copy(s.page(10), "unique")
	copy(s.page(11), "unique") // a duplicate
	return s
}

// page returns memory from a page on.
func (s *savedScene) page(n uint64) []byte {
	s.t.Helper()
	b, err := s.space.Writable(memory.GPA(n*4096), 4096*4)
	if err != nil {
		s.t.Fatal(err)
	}
	return b
}

func (s *savedScene) at(name string) string { return filepath.Join(s.dir, name) }

// save saves memory, which adds to the snapshot parent unless that is "".
func (s *savedScene) save(name, parent string) {
	s.t.Helper()
	source := bytes.NewReader(s.content)
	l := snapshot.Layer{ID: s.id, Path: s.disk, Size: int64(len(s.content)), Format: "raw"}
	f, err := snapshot.OpenLayer(s.dir, l)
	if err != nil {
		s.t.Fatal(err)
	}
	stamp, err := f.Stamp()
	if err := errors.Join(err, f.Close()); err != nil {
		s.t.Fatal(err)
	}
	l.Stamp = snapshot.Stamp(stamp)
	o := snapshot.Options{
		Space: s.space, Ditto: "v1.2.3", Created: time.Unix(1e9, 0), Config: fmt.Appendf(nil, `{"name":"web","disks":[{"path":%q}]}`, s.machineDisk),
		Layers: []snapshot.LayerSource{{Layer: l, Source: source}},
	}
	if parent != "" {
		p, err := snapshot.Open(s.at(parent), snapshot.OpenOptions{})
		if err != nil {
			s.t.Fatal(err)
		}
		defer p.Close()
		o.Parent, o.ParentPath = p, "../"+parent
	}
	pass := naming.Pass{Space: s.space, Layers: []naming.Layer{{Title: s.disk, Size: l.Size, Immutable: true, Source: source, Index: s.index}}}
	m, err := pass.Run(context.Background())
	if err != nil {
		s.t.Fatal(err)
	}
	target, err := snapshot.NewTarget(s.at(name))
	if err != nil {
		s.t.Fatal(err)
	}
	w, err := snapshot.Create(target, o)
	if err != nil {
		s.t.Fatal(err)
	}
	if err := w.Capture(context.Background(), snapshot.Capture{Map: m}); err != nil {
		s.t.Fatal(err)
	}
	if _, err := w.Commit(context.Background(), []snapshot.Section{{Name: "cpu", Version: 1}}); err != nil {
		s.t.Fatal(err)
	}
}

// fail runs a command line that must fail with one line.
func (s *savedScene) fail(code int, want string, args ...string) {
	s.t.Helper()
	got, out, errs := s.do(append([]string{"snapshot"}, args...)...)
	if got != code || !strings.Contains(errs, want) || strings.Count(errs, "\n") != 1 || out != "" {
		s.t.Errorf("%v: code %d, %q, %q; want %d, %q", args, got, out, errs, code, want)
	}
}

func TestSnapshotList(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	s.save("second", "first")
	for name, text := range map[string]string{"broken": "{}", "newer": `{"format":99}`} {
		if err := errors.Join(os.Mkdir(s.at(name), 0o700), os.WriteFile(filepath.Join(s.at(name), snapshot.ManifestName), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	lines := strings.Split(strings.TrimSpace(s.want("snapshot", "ls", s.dir)), "\n")
	if len(lines) != 5 {
		t.Fatalf("%q", lines)
	}
	for i, want := range []string{"PATH MACHINE CREATED MEMORY STORED PARENT STATE", "broken - - - 4KiB - damaged", "first web 2001-09-09 2MiB - -", "newer - - - 4KiB - newer version", "second web 2001-09-09 2MiB ../first -"} {
		at := 0
		for _, word := range strings.Fields(want) {
			n := strings.Index(lines[i][at:], word)
			if n < 0 && word != "4KiB" {
				t.Errorf("%q, want %q", lines[i], want)
				break
			}
			at += max(n, 0)
		}
	}
	var rows []snapshotRow
	if err := json.Unmarshal([]byte(s.want("snapshot", "ls", "--json", s.at("second"))), &rows); err != nil || len(rows) != 1 {
		t.Fatalf("%+v, %v", rows, err)
	}
	if r := rows[0]; r.Path != s.at("second") || r.Machine != "web" || r.MemoryBytes != 2<<20 || r.Depth != 1 || r.Parent != "../first" || r.StoredBytes == 0 || r.Error != "" {
		t.Errorf("%+v", r)
	}
	if out := s.want("snapshot", "ls", "--json", t.TempDir()); out != "[]\n" {
		t.Errorf("%q", out)
	}
	s.fail(exit.Snapshot, "no such file", "ls", s.at("missing"))
}

func TestSnapshotInspect(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	copy(s.page(20), "more")
	s.save("second", "first")
	out := s.want("snapshot", "inspect", s.at("first"))
	for _, want := range []string{
		"first: 2MiB of memory", "zeros ", "blocks of disk.img", "12KiB", "equal to another page", "unique", "machine     web",
		"by ditto v1.2.3", "ancestors   -", "dependents  " + s.at("second"), "LAYER", s.disk, "unchanged",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	parse := func(name string) (info snapshotInfo) {
		t.Helper()
		if err := json.Unmarshal([]byte(s.want("snapshot", "inspect", "--json", s.at(name))), &info); err != nil {
			t.Fatal(err)
		}
		return info
	}
	info := parse("second")
	want := snapshot.Holds{Zero: info.Holds.Zero, Blocks: 12 << 10, Parent: 4 << 10, Duplicate: 4 << 10, Unique: 4 << 10}
	if info.Holds != want || len(info.Ancestors) != 1 || len(info.Dependents) != 0 || len(info.Sections) != 1 {
		t.Errorf("%+v", info)
	}
	if l := info.Layers; len(l) != 1 || l[0].State != "unchanged" || l[0].NamedBytes != 12<<10 || l[0].ID != s.id.String() {
		t.Errorf("%+v", l)
	}
	for _, c := range []struct {
		state  string
		change func() error
	}{
		{"touched", func() error { return os.Chtimes(s.disk, time.Now(), time.Now()) }},
		{"changed", func() error { return os.Truncate(s.disk, 4096) }},
		{"missing", func() error { return os.Remove(s.disk) }},
	} {
		if err := c.change(); err != nil {
			t.Fatal(err)
		}
		if l := parse("first").Layers; len(l) != 1 || l[0].State != c.state {
			t.Errorf("%s: %+v", c.state, l)
		}
	}
	s.fail(exit.Snapshot, "manifest.json", "inspect", s.dir)
}

func TestSnapshotPicture(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	file := s.at("first.png")
	if out := s.want("snapshot", "inspect", s.at("first"), "-o", file); !strings.HasPrefix(out, file+": ") {
		t.Errorf("%q", out)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := png.Decode(f); err != nil {
		t.Error(err)
	}
	s.fail(exit.Usage, ".png or .svg", "inspect", s.at("first"), "-o", s.at("x.jpeg"))
	snap, err := snapshot.Open(s.at("first"), snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer snap.Close()
	checkPicture(t, snap)
	checkPicture(t, largeSnapshot(t))
}

// largeSnapshot is one of a memory of more than 4 GiB.
func largeSnapshot(t *testing.T) *snapshot.Snapshot {
	t.Helper()
	space, err := memory.New(memory.Config{Size: 5<<30 + 12<<10})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	for _, gpa := range []memory.GPA{0, 2<<20 - 4096, memory.HoleEnd, memory.HoleEnd + 2<<30 + 8<<10} {
		b, err := space.Writable(gpa, 4096)
		if err != nil {
			t.Fatal(err)
		}
		b[0] = 1 + byte(gpa>>20)
	}
	dir := filepath.Join(t.TempDir(), "large")
	target, err := snapshot.NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	w, err := snapshot.Create(target, snapshot.Options{Space: space})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Capture(t.Context(), snapshot.Capture{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	snap, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { snap.Close() })
	return snap
}

// checkPicture adds up what is drawn.
func checkPicture(t *testing.T, snap *snapshot.Snapshot) {
	t.Helper()
	m := snapshotPicture(snap)
	if err := m.Check(); err != nil {
		t.Fatal(err)
	}
	drawn := make([]uint64, len(m.Classes))
	for _, class := range m.Pages {
		drawn[class] += memmap.PageSize
	}
	for i, n := range m.Counts {
		drawn[i%len(m.Classes)] += uint64(n) * memmap.PageSize
	}
	for i, c := range m.Classes {
		if drawn[i] != c.Bytes {
			t.Errorf("%s %s: %d bytes are drawn of %d", c.Kind, c.Title, drawn[i], c.Bytes)
		}
	}
}

func TestSnapshotVerify(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	s.save("second", "first")
	want := s.at("second") + ": intact, 2MiB of memory, with 1 ancestors\n" + s.at("first") + ": intact, 2MiB of memory, with 0 ancestors\n"
	if out := s.want("snapshot", "verify", s.at("second"), s.at("first")); out != want {
		t.Errorf("%q", out)
	}
	if err := os.WriteFile(filepath.Join(s.at("first"), snapshot.PagesName), bytes.Repeat([]byte("x"), 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	s.fail(exit.Snapshot, "slot 0 was altered", "verify", s.at("second"))
	s.fail(exit.Snapshot, "slot 0 was altered", "verify", s.at("missing"), s.at("first"))
}

func TestSnapshotRemove(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	s.save("second", "first")
	s.save("other", "")
	overlay := s.at("disk.second.qcow2")
	if err := chain.CreateOverlay(overlay, s.disk, chain.Raw, int64(len(s.content))); err != nil {
		t.Fatal(err)
	}
	away := t.TempDir()
	if err := os.Rename(s.at("second"), filepath.Join(away, "second")); err != nil {
		t.Fatal(err)
	}
	s.fail(exit.Snapshot, "depend on it: "+filepath.Join(away, "second")+": remove those first", "rm", s.at("first"), "--search", away)
	if err := os.Rename(filepath.Join(away, "second"), s.at("second")); err != nil {
		t.Fatal(err)
	}
	s.fail(exit.Snapshot, "depend on it: "+s.at("second"), "rm", s.at("first"))
	s.fail(exit.Snapshot, "there is none", "rm", s.at("missing"))
	needed := s.disk + " stays: needed by " + overlay
	want := s.at("second") + ": removed\n" + needed + ", " + s.at("first") + ", " + s.at("other") + "\n" +
		s.at("first") + ": removed\n" + needed + ", " + s.at("other") + "\n"
	if out := s.want("snapshot", "rm", s.at("first"), s.at("second")); out != want {
		t.Errorf("%q, want %q", out, want)
	}
	if err := os.Remove(overlay); err != nil {
		t.Fatal(err)
	}
	if out, want := s.want("snapshot", "rm", s.at("other")), s.at("other")+": removed\n"+s.disk+" stays: nothing that was found needs it\n"; out != want {
		t.Errorf("%q, want %q", out, want)
	}
}

// TestSnapshotExport: what was packed restores elsewhere, with the disk that came
// along.
func TestSnapshotExport(t *testing.T) {
	s := newSavedScene(t)
	s.save("first", "")
	s.save("second", "first")
	file, there := s.at("web.ditto"), s.at("there")
	var packed archive.Report
	if err := json.Unmarshal([]byte(s.want("snapshot", "export", "--json", s.at("second"), file)), &packed); err != nil || len(packed.Snapshots) != 2 || packed.Images != 1 {
		t.Errorf("%+v, %v", packed, err)
	}
	s.fail(exit.Snapshot, "exists already: remove it, or name another", "export", s.at("second"), file)
	if err := errors.Join(os.RemoveAll(s.at("first")), os.RemoveAll(s.at("second")), os.Remove(s.disk)); err != nil {
		t.Fatal(err)
	}
	if out := s.want("snapshot", "import", file, there); out != there+"/second: intact; 'ditto restore' lets it go on\n" {
		t.Errorf("%q", out)
	}
	s.fail(exit.Snapshot, "exists already: remove it, or name another", "import", file, there)
	s.want("snapshot", "verify", filepath.Join(there, "second"))
	disk := filepath.Join(there, snapshot.LayersName, snapshot.LayerName(s.id, chain.Raw))
	if b, err := os.ReadFile(disk); err != nil || !bytes.Equal(b, s.content) {
		t.Errorf("the disk is another, %v", err)
	}

	// Through a pipe, and damaged.
	code, out, errs := s.do("snapshot", "export", filepath.Join(there, "first"), "-")
	if code != 0 || errs != "" {
		t.Fatalf("code %d: %s", code, errs)
	}
	if err := os.WriteFile(file, []byte(out[:len(out)-20]), 0o600); err != nil {
		t.Fatal(err)
	}
	s.fail(exit.Snapshot, "check how it was copied", "import", file, s.at("again"))
	if err := os.WriteFile(file, []byte(out), 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	s.null = f
	if out := s.want("snapshot", "import", "-", s.at("again")); !strings.Contains(out, "again/first") {
		t.Errorf("%q", out)
	}
	s.fail(exit.Snapshot, "no such file", "import", s.at("missing"), s.at("x"))
}

// TestSnapshotExportRefuses what would not restore elsewhere.
func TestSnapshotExportRefuses(t *testing.T) {
	s := newSavedScene(t)
	s.machineDisk = s.at("another.img")
	s.save("strange", "")
	s.fail(exit.Snapshot, "another.img of its machine is not among its layers", "export", s.at("strange"), s.at("file"))
	s.machineDisk = s.disk
	s.save("first", "")
	if err := os.Remove(s.disk); err != nil {
		t.Fatal(err)
	}
	s.fail(exit.Snapshot, "layer missing", "export", s.at("first"), s.at("file"))
	if _, err := os.Lstat(s.at("file")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}
