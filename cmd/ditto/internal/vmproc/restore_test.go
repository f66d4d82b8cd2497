package vmproc

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/cmd/ditto/internal/exit"
	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm"
	"ditto.vm/vmm/config"
)

// snapshotOf makes a snapshot of empty memory that declares raw images as layers.
func snapshotOf(t *testing.T, images ...string) string {
	t.Helper()
	space, err := memory.New(memory.Config{Size: 1 << 20})
	if err != nil {
		t.Fatal(err)
	}
	defer space.Close()
	var layers []snapshot.LayerSource
	for i, path := range images {
		l := snapshot.Layer{ID: layer.NewWritten(), Path: path, Size: 1 << 20, Format: "raw"}
		f, err := snapshot.OpenLayer(filepath.Dir(path), l)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		stamp, err := f.Stamp()
		if err != nil {
			t.Fatal(err)
		}
		l.Stamp = snapshot.Stamp(stamp)
		layers = append(layers, snapshot.LayerSource{Layer: l, Source: f, Names: names.LayerID(i)})
	}
	dir := filepath.Join(t.TempDir(), "snap")
	target, err := snapshot.NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	w, err := snapshot.Create(target, snapshot.Options{Space: space, Layers: layers})
	if err == nil {
		err = w.Capture(t.Context(), snapshot.Capture{})
	}
	if err == nil {
		_, err = w.Commit(t.Context(), nil)
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

func open(t *testing.T, dir string) *snapshot.Snapshot {
	t.Helper()
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	return s
}

// TestRelocate: images are where they were, or beside the snapshot, and are what
// they were.
func TestRelocate(t *testing.T) {
	dir := t.TempDir()
	stays, moves := frozenDisk(t, dir, "stays"), frozenDisk(t, dir, "moves")
	snap := open(t, snapshotOf(t, stays, moves))
	moved := filepath.Join(filepath.Dir(snap.Dir()), snapshot.LayersName, snapshot.LayerName(snap.Manifest().Layers[1].ID, chain.Raw))
	if err := errors.Join(os.Mkdir(filepath.Dir(moved), 0o700), os.Rename(moves, moved)); err != nil {
		t.Fatal(err)
	}
	cfg := config.Config{Kernel: moves, Initrd: "none", Disks: []config.Disk{{Path: stays, Serial: "a"}, {Path: moves, ReadOnly: true}}}
	saved := cfg.Disks[0]
	if err := relocate(&cfg, snap); err != nil {
		t.Fatal(err)
	}
	want := config.Config{Kernel: moved, Initrd: "none", Disks: []config.Disk{{Path: stays, Serial: "a", Format: chain.Raw}, {Path: moved, ReadOnly: true, Format: chain.Raw}}}
	if diff := cmp.Diff(want, cfg); diff != "" {
		t.Error(diff)
	}

	// A snapshot of somebody else must not bring in other files of the user.
	secret := config.Config{Disks: []config.Disk{{Path: frozenDisk(t, dir, "secret")}}}
	if err := relocate(&secret, snap); !errors.Is(err, snapshot.ErrLayer) || !strings.Contains(err.Error(), "nothing says what") {
		t.Errorf("%v", err)
	}
	if err := os.Chtimes(stays, time.Time{}, time.Now().Add(time.Hour)); err != nil {
		t.Fatal(err)
	}
	odd := config.Config{Disks: []config.Disk{{Path: filepath.Dir(stays) + "/./" + filepath.Base(stays)}}}
	if err := relocate(&odd, snap); !errors.Is(err, snapshot.ErrLayer) {
		t.Errorf("another way to say the path: %v", err)
	}
	cfg = config.Config{Disks: []config.Disk{saved}}
	if err := relocate(&cfg, snap); !errors.Is(err, snapshot.ErrLayer) || Classify(err) != exit.Snapshot || !strings.Contains(err.Error(), "stays was written since") {
		t.Errorf("%v", err)
	}
	if err := os.Remove(stays); err != nil {
		t.Fatal(err)
	}
	if err := relocate(&cfg, snap); err == nil || Classify(err) != exit.Disk {
		t.Errorf("%v", err)
	}
}

// TestRestoreFails: nothing is left of a machine that does not come out of its
// snapshot.
func TestRestoreFails(t *testing.T) {
	dir := t.TempDir()
	disk := frozenDisk(t, dir, "disk")
	snap := snapshotOf(t, disk)
	id := open(t, snap).ID()
	overlays := filepath.Join(dir, "overlays")
	cfg := config.Default()
	cfg.Name, cfg.Kernel, cfg.Initrd, cfg.Nets = "web", "payload:hello", config.InitrdNone, nil
	cfg.Disks = []config.Disk{{Path: disk}}
	s := Surroundings{Log: slog.New(slog.DiscardHandler), Console: io.Discard}
	for name, test := range map[string]struct {
		r    Restore
		want string
	}{
		"another snapshot": {Restore{Dir: snap, ID: snapshot.ID{1}}, "replaced by another"},
		"no snapshot":      {Restore{Dir: dir, ID: id}, "not an intact snapshot"},
		"no sections":      {Restore{Dir: snap, ID: id}, "machine"},
	} {
		test.r.Overlays = overlays
		m, err := test.r.Builder()(context.Background(), cfg, s)
		if m != nil || err == nil || !strings.Contains(err.Error(), test.want) || Classify(err) != exit.Snapshot {
			t.Errorf("%s: %v, %v (code %d)", name, m, err, Classify(err))
		}
		if entries, err := os.ReadDir(overlays); err == nil && len(entries) > 0 {
			t.Errorf("%s: left: %v", name, entries)
		}
	}
}

func TestAdvise(t *testing.T) {
	for mode, want := range map[config.NetMode]string{config.NetUser: "-p none", config.NetTap: "--net"} {
		err := advise(&vmm.NetError{Mode: mode, Err: errors.New("taken")})
		if !strings.Contains(err.Error(), want) || Classify(err) != exit.Net {
			t.Errorf("%v", err)
		}
	}
	other := errors.New("other")
	if err := advise(other); !errors.Is(err, other) || err.Error() != "other" {
		t.Errorf("%v", err)
	}
}
