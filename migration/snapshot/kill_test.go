package snapshot

import (
	"context"
	"errors"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"ditto.vm/memory"
)

const (
	envKilled = "DITTO_TEST_SNAPSHOT_WRITER"
	envKills  = "DITTO_SNAPSHOT_KILLS"
)

// TestKilledWriter is the process that TestKill kills.
func TestKilledWriter(t *testing.T) {
	dir := os.Getenv(envKilled)
	if dir == "" {
		t.Skip("a part of TestKill")
	}
	s := killScene(t)
	target, err := NewTarget(filepath.Join(dir, "snap"))
	if err != nil {
		t.Fatal(err)
	}
	w, err := Create(target, s.options(None))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "begun"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	all := s.space.NewPageSet()
	all.Add(0, s.space.Size())
	if err := w.AddPages(context.Background(), all); err != nil {
		t.Fatal(err)
	}
	s.finish(w, Capture{Map: s.pass(false)})
	if err := os.WriteFile(filepath.Join(dir, "done"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	select {} // until it is killed
}

func killScene(t *testing.T) *scene {
	s := newScene(t, 88, 8<<20)
	s.scribble(60)
	return s
}

// TestKill kills a writer at random points: what has the snapshot's name is
// whole, and the next writer takes the rest away. DITTO_SNAPSHOT_KILLS sets how
// often.
func TestKill(t *testing.T) {
	kills := 5
	if n, err := strconv.Atoi(os.Getenv(envKills)); err == nil {
		kills = n
	}
	s := killScene(t)
	took := time.Duration(0) // by the first, which is not killed before its end
	whole, none := 0, 0
	for i := range kills {
		dir := t.TempDir()
		writer := exec.Command(os.Args[0], "-test.run=^TestKilledWriter$")
		writer.Env = append(os.Environ(), envKilled+"="+dir)
		if err := writer.Start(); err != nil {
			t.Fatal(err)
		}
		begun := waitFor(t, writer, filepath.Join(dir, "begun"))
		if i == 0 {
			took = waitFor(t, writer, filepath.Join(dir, "done")).Sub(begun)
		} else {
			time.Sleep(time.Duration(rand.Int64N(int64(took))))
		}
		writer.Process.Kill()
		writer.Wait()
		_, err := os.Lstat(filepath.Join(dir, "snap"))
		switch {
		case err == nil:
			whole++
			s.checkKilled(filepath.Join(dir, "snap"))
		case errors.Is(err, fs.ErrNotExist):
			none++
			target, err := NewTarget(filepath.Join(dir, "snap"))
			if err != nil {
				t.Fatal(err)
			}
			if names := left(t, dir); len(names) != 2 { // begun, and the new one
				t.Errorf("left: %v", names)
			}
			target.Abort()
		default:
			t.Fatal(err)
		}
	}
	t.Logf("%d whole, %d none", whole, none)
	if whole == 0 {
		t.Error("the writer that was not killed left no snapshot")
	}
}

// checkKilled reads a snapshot of the same memory in a folder without a layer.
func (s *scene) checkKilled(path string) {
	s.t.Helper()
	raw := func(_ string, l Layer) (LayerFile, error) {
		l.Path = "disk.img"
		return OpenLayer(s.dir, l)
	}
	snap, err := Open(path, OpenOptions{OpenLayer: raw})
	if err != nil {
		s.t.Fatal(err)
	}
	defer snap.Close()
	if err := snap.Verify(context.Background(), LoadOptions{}); err != nil {
		s.t.Error(err)
	}
	s.checkLoad(snap)
}

// waitFor waits until a process has made a file.
func waitFor(t *testing.T, p *exec.Cmd, path string) time.Time {
	t.Helper()
	for range 100000 {
		if _, err := os.Lstat(path); err == nil {
			return time.Now()
		}
		time.Sleep(time.Millisecond)
	}
	p.Process.Kill()
	p.Wait()
	t.Fatalf("%s did not appear", path)
	return time.Time{}
}

// TestTwoSaves: while one lives, another into the same name is refused, and
// debris is told from it.
func TestTwoSaves(t *testing.T) {
	s := newScene(t, 89, 1<<20)
	s.fill(s.page(0))
	path := filepath.Join(s.dir, "snap")
	w := s.create("snap", s.options(None))
	if _, err := NewTarget(path); !errors.Is(err, ErrBusy) {
		t.Errorf("a second save: %v", err)
	}
	dead := filepath.Join(s.dir, ".snap.partial-999999999")
	strange := filepath.Join(s.dir, ".other.partial-1")
	for _, dir := range []string{dead, strange} {
		if err := os.MkdirAll(filepath.Join(dir, SectionsName), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	os.WriteFile(filepath.Join(dead, PagesName), make([]byte, memory.PageSize), 0o600)
	os.WriteFile(filepath.Join(strange, "photos"), nil, 0o600)
	if err := Sweep(s.dir); err == nil {
		t.Error("sweeping says nothing of what is not of a snapshot")
	}
	if _, err := os.Lstat(filepath.Join(strange, "photos")); err != nil {
		t.Error("sweeping removed what is not of a snapshot")
	}
	if _, err := os.Lstat(dead); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("debris: %v", err)
	}
	s.finish(w, Capture{})
	if _, err := NewTarget(path); !errors.Is(err, ErrExists) {
		t.Errorf("a save into what exists: %v", err)
	}
	// It appeared while another was being written.
	os.Rename(path, path+"2")
	w = s.create("snap", s.options(None))
	os.Rename(path+"2", path)
	if err := w.Capture(context.Background(), Capture{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(context.Background(), nil); !errors.Is(err, ErrExists) {
		t.Errorf("the name was taken meanwhile: %v", err)
	}
	s.checkLoad(s.open("snap"))
}
