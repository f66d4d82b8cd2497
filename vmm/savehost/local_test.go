package savehost

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/images/chain"
)

// TestAbandon: when a machine is gone before its snapshot is whole, its disk is as
// it was. When the snapshot is whole, the disk stays as that needs it, whatever the
// machine asked for.
func TestAbandon(t *testing.T) {
	for _, whole := range []bool{false, true} {
		dir := t.TempDir()
		disk := filepath.Join(dir, "disk.img")
		if err := os.WriteFile(disk, make([]byte, 1<<16), 0o600); err != nil {
			t.Fatal(err)
		}
		l, err := NewLocal(filepath.Join(dir, "snap"), Options{})
		if err != nil {
			t.Fatal(err)
		}
		o, err := l.Overlay(t.Context(), OverlayRequest{Below: disk, Format: chain.Raw, Size: 1 << 16})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.NewFile(uintptr(o.FD), o.Path).Close(); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o600)
		if whole {
			mode = 0o400
			if err := l.Commit(); err != nil {
				t.Fatal(err)
			}
			if err := l.DropOverlay(0); err == nil {
				t.Error("a disk that a snapshot needs is thawed")
			}
		}
		was, kept, err := l.Abandon()
		if err != nil || was != whole || len(kept) != map[bool]int{true: 1}[whole] {
			t.Errorf("whole %v, kept %q, %v; want whole %v", was, kept, err, whole)
		}
		if info, err := os.Stat(disk); err != nil || info.Mode() != mode {
			t.Errorf("whole %v: disk %v, %v, want mode %v", whole, info, err, mode)
		}
		if _, err := os.Stat(o.Path); (err == nil) != whole {
			t.Errorf("whole %v: overlay %v", whole, err)
		}
		if _, err := os.Stat(filepath.Join(dir, "snap")); (err == nil) != whole {
			t.Errorf("whole %v: snapshot %v", whole, err)
		}
	}
}

// TestKilled: what a client that is killed leaves of a disk is gone when the
// machine, which goes on, has the disk frozen the next time, under any name; what
// is not its own stays.
func TestKilled(t *testing.T) {
	for _, tc := range []struct {
		name       string
		freezeOnly bool
		between    func(t *testing.T, disk, overlay, note string)
		stays      bool        // the overlay
		mode       fs.FileMode // of the disk after the next save is undone
		machine    string      // that is saved next
	}{
		{"overlay", false, func(*testing.T, string, string, string) {}, false, 0o640, "1"},
		{"frozen only", true, func(*testing.T, string, string, string) {}, false, 0o640, "1"},
		{"another overlay of that name", false, func(t *testing.T, _, overlay, _ string) {
			b, err := os.ReadFile(overlay)
			if err := errors.Join(err, os.WriteFile(overlay+".new", b, 0o600), os.Rename(overlay+".new", overlay)); err != nil {
				t.Fatal(err)
			}
		}, true, 0o640, "1"},
		{"note cut short", false, func(t *testing.T, _, _, note string) {
			if err := os.Truncate(note, 5); err != nil {
				t.Fatal(err)
			}
		}, true, 0o440, "1"},
		{"note of another folder", false, func(t *testing.T, _, _, note string) {
			b, err := os.ReadFile(note)
			b = bytes.Replace(b, []byte(`"overlay":"`), []byte(`"overlay":"/proc/self/root`), 1)
			if err := errors.Join(err, os.WriteFile(note, b, 0o600)); err != nil {
				t.Fatal(err)
			}
		}, true, 0o440, "1"},
		{"thawed by hand", false, func(t *testing.T, disk, _, _ string) {
			if err := os.Chmod(disk, 0o600); err != nil {
				t.Fatal(err)
			}
		}, false, 0o600, "1"},
		{"another machine", false, func(*testing.T, string, string, string) {}, true, 0o440, "2"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			dir := t.TempDir()
			disk := raw(t, filepath.Join(dir, "disk.img"))
			request := OverlayRequest{Below: disk, Format: chain.Raw, Size: diskSize, FreezeOnly: tc.freezeOnly}
			killed := local(t, filepath.Join(t.TempDir(), "snap"), Options{Machine: "1"})
			o, err := killed.Overlay(t.Context(), request)
			if err != nil {
				t.Fatal(err)
			}
			closeAll(t, o)
			tc.between(t, disk, o.Path, noteOf(dir, disk))

			next := local(t, filepath.Join(t.TempDir(), "another"), Options{Machine: tc.machine})
			if o, err = next.Overlay(t.Context(), request); err != nil {
				t.Fatal(err)
			}
			closeAll(t, o)
			if err := next.DropOverlay(0); err != nil {
				t.Error(err)
			}
			want := []string{"disk.img"}
			if tc.stays {
				want = []string{"disk.img", "disk.snap.qcow2"}
			}
			var left []string
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				left = append(left, e.Name())
			}
			if diff := cmp.Diff(want, left); diff != "" {
				t.Errorf("left (-want +got):\n%s", diff)
			}
			if info, err := os.Stat(disk); err != nil || info.Mode() != tc.mode {
				t.Errorf("the disk has mode %v, %v, want %v", info.Mode(), err, tc.mode)
			}
			if err := errors.Join(next.Abort(), killed.Abort()); err != nil {
				t.Error(err)
			}
		})
	}
}
