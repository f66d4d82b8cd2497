package vmproc

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/chain"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/registry"
)

// frozenDisk makes an immutable raw image.
func frozenDisk(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(strings.Repeat(name[:1], 1<<20)), 0o400); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestOverlays(t *testing.T) {
	dir := t.TempDir()
	raw, readOnly := frozenDisk(t, dir, "raw"), frozenDisk(t, dir, "other")
	stacked := filepath.Join(dir, "stacked.qcow2")
	if err := chain.CreateOverlay(stacked, raw, chain.Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	saved := config.Config{Disks: []config.Disk{{Path: raw, Serial: "a"}, {Path: readOnly, ReadOnly: true}, {Path: stacked, Format: chain.Qcow2}}}
	folder := filepath.Join(dir, "overlays", "web")
	at := func(name string) string { return filepath.Join(folder, name) }
	for _, want := range [][]string{{"blk0.qcow2", "blk2.qcow2"}, {"blk0-2.qcow2", "blk2-2.qcow2"}} {
		cfg := saved
		made, err := newOverlays(folder, &cfg)
		if err != nil {
			t.Fatal(err)
		}
		expected := []config.Disk{
			{Path: at(want[0]), Serial: "a", Format: chain.Qcow2},
			{Path: readOnly, ReadOnly: true},
			{Path: at(want[1]), Format: chain.Qcow2},
		}
		if diff := cmp.Diff(expected, cfg.Disks); diff != "" {
			t.Error(diff)
		}
		for i, path := range made.paths {
			c, err := chain.Open(path, chain.Options{})
			if err != nil {
				t.Fatal(err)
			}
			if got := c.Layers()[1].Path(); got != saved.Disks[2*i].Path || c.Size() != 1<<20 {
				t.Errorf("%s: %d bytes on %s", path, c.Size(), got)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		}
		if want[0] == "blk0.qcow2" {
			continue // stays, as that of a machine that was restored before
		}
		if err := made.remove(); err != nil {
			t.Error(err)
		}
	}
	if saved.Disks[0].Path != raw {
		t.Error("the configuration that was given was changed")
	}
	entries, err := os.ReadDir(folder)
	if err != nil || len(entries) != 2 {
		t.Errorf("left: %v, %v", entries, err)
	}
	disks := disksOf(saved, true)
	want := []registry.Disk{{Path: raw, Temporary: true}, {Path: readOnly, ReadOnly: true}, {Path: stacked, Format: chain.Qcow2, Temporary: true}}
	if diff := cmp.Diff(want, disks); diff != "" {
		t.Error(diff)
	}
}

// TestOverlaysFail: what was made before a disk that is not there is removed.
func TestOverlaysFail(t *testing.T) {
	dir := t.TempDir()
	raw := frozenDisk(t, dir, "raw")
	folder := filepath.Join(dir, "web")
	cfg := config.Config{Disks: []config.Disk{{Path: raw}, {Path: filepath.Join(dir, "absent")}}}
	if _, err := newOverlays(folder, &cfg); err == nil || !strings.Contains(err.Error(), "absent") {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(folder); !os.IsNotExist(err) {
		t.Errorf("left behind: %v", err)
	}
	// A disk that somebody writes was not frozen.
	if err := os.Chmod(raw, 0o600); err != nil {
		t.Fatal(err)
	}
	writer, err := chain.Open(raw, chain.Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer writer.Close()
	cfg = config.Config{Disks: []config.Disk{{Path: raw}}}
	if _, err := newOverlays(folder, &cfg); Classify(err) != 7 {
		t.Errorf("%v", err)
	}
}
