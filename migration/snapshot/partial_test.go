package snapshot

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// TestCommitUnsynced: a snapshot whose name cannot be made durable is not there.
func TestCommitUnsynced(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs to be somebody else for a moment; try: run as root")
	}
	const nobody = 65534
	dir, err := os.MkdirTemp("", "snapshot-test-")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	target, err := NewTarget(filepath.Join(dir, "snap"))
	if err != nil {
		t.Fatal(err)
	}
	temporary := target.(partial).Temporary()
	for path, mode := range map[string]os.FileMode{temporary: 0o700, filepath.Join(temporary, SectionsName): 0o700, dir: 0o300} {
		if err := os.Chown(path, nobody, nobody); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil { // the folder can be entered and changed, but not opened
			t.Fatal(err)
		}
	}
	// Of this thread alone.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := unix.Setfsuid(nobody); err != nil {
		t.Fatal(err)
	}
	err = target.Commit()
	if back := unix.Setfsuid(0); back != nil {
		t.Fatal(back)
	}
	if err == nil {
		t.Error("it is complete")
	}
	if _, err := os.Stat(filepath.Join(dir, "snap")); !os.IsNotExist(err) {
		t.Errorf("it has its name: %v", err)
	}
	if err := target.Abort(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}
