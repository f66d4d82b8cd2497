package savehost

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
)

const diskSize = 1 << 16

// raw makes a disk and returns its path.
func raw(t *testing.T, path string) string {
	t.Helper()
	if err := os.WriteFile(path, make([]byte, diskSize), 0o640); err != nil {
		t.Fatal(err)
	}
	return path
}

func local(t *testing.T, path string, o Options) *Local {
	t.Helper()
	l, err := NewLocal(path, o)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func closeAll(t *testing.T, o Overlay) {
	t.Helper()
	for _, fd := range []int{o.FD, o.Buffered} {
		if fd >= 0 {
			if err := unix.Close(fd); err != nil {
				t.Error(err)
			}
		}
	}
}

// TestOverlayNames: overlays of overlays are called after what is at the bottom,
// and never take the place of a file.
func TestOverlayNames(t *testing.T) {
	dir := t.TempDir()
	below, format := raw(t, filepath.Join(dir, "web.v2.img")), chain.Raw
	for _, tc := range []struct{ snapshot, want string }{
		{"monday", "web.v2.monday.qcow2"}, {"tuesday", "web.v2.tuesday.qcow2"}, {"monday", "web.v2.monday-2.qcow2"}, {"monday", "web.v2.monday-3.qcow2"},
	} {
		path := filepath.Join(t.TempDir(), tc.snapshot)
		l := local(t, path, Options{})
		o, err := l.Overlay(t.Context(), OverlayRequest{Below: below, Format: format, Size: diskSize})
		if err != nil {
			t.Fatal(err)
		}
		closeAll(t, o)
		if filepath.Base(o.Path) != tc.want || filepath.Dir(o.Path) != dir || o.Buffered != -1 {
			t.Errorf("overlay %+v, want %s", o, tc.want)
		}
		if info, err := os.Stat(below); err != nil || info.Mode()&0o222 != 0 {
			t.Errorf("what is below is %v, %v", info.Mode(), err)
		}
		if err := l.Abort(); err != nil {
			t.Error(err)
		}
		below, format = o.Path, chain.Qcow2
	}
	c, err := chain.Open(below, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	if got := len(c.Layers()); got != 5 {
		t.Errorf("%d layers", got)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
}

// TestDropOverlay: file and permissions are as they were.
func TestDropOverlay(t *testing.T) {
	dir := t.TempDir()
	disk := raw(t, filepath.Join(dir, "disk.img"))
	for _, r := range []OverlayRequest{
		{Below: disk, Format: chain.Raw, Size: diskSize, Direct: true},
		{Below: disk, Format: chain.Raw, Size: diskSize, FreezeOnly: true},
		{Below: disk, Format: "vmdk", Size: diskSize},
		{Below: disk, Format: chain.Raw, Size: 1},
	} {
		l := local(t, filepath.Join(t.TempDir(), "snap"), Options{})
		o, err := l.Overlay(t.Context(), r)
		if errors.Is(err, unix.EINVAL) && r.Direct {
			t.Skipf("%v; try: TMPDIR on a file system with O_DIRECT", err)
		}
		if bad := r.Format == "vmdk" || r.Size == 1; bad != (err != nil) {
			t.Errorf("%+v: %v", r, err)
		}
		if err == nil {
			if got := []bool{o.FD >= 0, o.Buffered >= 0}; !slices.Equal(got, []bool{!r.FreezeOnly, r.Direct}) {
				t.Errorf("%+v: descriptors %+v", r, o)
			}
			if info, err := os.Stat(disk); err != nil || info.Mode() != 0o440 {
				t.Errorf("%+v: frozen disk %v, %v", r, info.Mode(), err)
			}
			if _, err := l.Overlay(t.Context(), r); err == nil {
				t.Error("a disk is frozen twice")
			}
			closeAll(t, o)
		}
		if err := errors.Join(l.DropOverlay(0), l.DropOverlay(0), l.DropOverlay(7), l.Abort()); err != nil {
			t.Error(err)
		}
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) != 1 {
			t.Errorf("%+v: left %v, %v", r, entries, err)
		}
		if info, err := os.Stat(disk); err != nil || info.Mode() != 0o640 {
			t.Errorf("%+v: disk %v, %v", r, info.Mode(), err)
		}
	}
}

// TestOverlayRefused: a disk that is not the machine's, and a save that is over.
func TestOverlayRefused(t *testing.T) {
	disk := raw(t, filepath.Join(t.TempDir(), "disk.img"))
	foreign := errors.New("not a disk of the machine")
	l := local(t, filepath.Join(t.TempDir(), "snap"), Options{Check: func(r OverlayRequest) error {
		if r.Below != "mine" {
			return foreign
		}
		return nil
	}})
	r := OverlayRequest{Below: disk, Format: chain.Raw, Size: diskSize}
	if _, err := l.Overlay(t.Context(), r); !errors.Is(err, foreign) {
		t.Errorf("%v", err)
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := l.Overlay(over, r); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	if info, err := os.Stat(disk); err != nil || info.Mode() != 0o640 {
		t.Errorf("disk %v, %v", info.Mode(), err)
	}
	if err := l.Abort(); err != nil {
		t.Error(err)
	}
}

// save makes a snapshot of a little memory.
func save(t *testing.T, path string, parent *snapshot.Snapshot, parentPath string) *snapshot.Snapshot {
	t.Helper()
	space, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	w, err := snapshot.Create(local(t, path, Options{}), snapshot.Options{Space: space, Parent: parent, ParentPath: parentPath})
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Capture(t.Context(), snapshot.Capture{}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	s, err := snapshot.Open(path, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// TestOpenSnapshotFile: files of the parent and its ancestors are lent, wherever
// they were moved to, and no others.
func TestOpenSnapshotFile(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	first := save(t, at("first"), nil, "")
	save(t, at("second"), first, "../moved/away")
	save(t, at("stranger"), nil, "")
	l := local(t, at("third"), Options{Parent: at("second")})
	defer l.Abort()
	open := func(dir, name string) error {
		f, err := l.OpenSnapshotFile(dir, name)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.ReadAll(f)
		return err
	}
	for _, tc := range []struct {
		dir, name string
		ok        bool
	}{
		{at("second"), snapshot.ManifestName, true}, {at("second") + "/", snapshot.PagesName, true},
		{at("moved/away"), snapshot.ManifestName, true},
		{at("first"), snapshot.ManifestName, false}, {at("stranger"), snapshot.ManifestName, false}, {"/etc", "passwd", false},
		{at("second"), "../stranger/" + snapshot.ManifestName, false}, {at("second"), "/etc/passwd", false},
	} {
		if err := open(tc.dir, tc.name); (err == nil) != tc.ok {
			t.Errorf("%s of %s: %v", tc.name, tc.dir, err)
		}
	}
	// And so the machine finds its way.
	s, err := snapshot.Open(at("second"), snapshot.OpenOptions{OpenFile: l.OpenSnapshotFile, FindParent: func(dir string, p snapshot.Parent) (string, error) {
		return ParentDir(dir, p), nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	if s.Parent().ID() != first.ID() {
		t.Error("another parent was found")
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := NewLocal(at("fourth"), Options{Parent: at("absent")}); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("a parent that is not there: %v", err)
	}
	if _, err := os.Stat(at("fourth")); !os.IsNotExist(err) {
		t.Errorf("it is there: %v", err)
	}
}
