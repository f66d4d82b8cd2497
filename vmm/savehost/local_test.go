package savehost

import (
	"os"
	"path/filepath"
	"testing"

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
