package vmm

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// TestRestoreAltered: a guest that needs a page that was altered ends, and says
// why.
func TestRestoreAltered(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.Zstd)
	alterPages(t, dir, func(f *os.File, size int64) error {
		// Most frames, but not those of the program itself, which come first.
		for at := size / 4; at < size; at += 4096 {
			if _, err := f.WriteAt([]byte("?"), at); err != nil {
				return err
			}
		}
		return nil
	})
	m := restoreFrom(t, dir, SnapshotOptions{Config: c})
	ctx := deadline(t)
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitFailed || !errors.Is(exit.Err, snapshot.ErrFormat) || !strings.Contains(exit.Err.Error(), "altered") {
		t.Errorf("exit %+v, %v, want one that says what was altered", exit, err)
	}
	if _, err := tryRestore(t, dir, SnapshotOptions{Config: c, Mode: RestoreEager}); !errors.Is(err, snapshot.ErrFormat) {
		t.Errorf("eager: %v", err)
	}
}

// TestRestoreTruncated: a snapshot that is cut short is refused, and if that
// happens while it is mapped, the guest ends and says why.
func TestRestoreTruncated(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.None)
	m := restoreFrom(t, dir, SnapshotOptions{Config: c})
	ctx := deadline(t)
	alterPages(t, dir, func(f *os.File, _ int64) error { return f.Truncate(2 << 20) })
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(ctx)
	pages := filepath.Join(dir, "pages")
	if err != nil || exit.Reason != ExitFailed || !strings.Contains(exit.Err.Error(), pages+" has 2097152 bytes") {
		t.Errorf("exit %+v, %v, want one that names %s", exit, err, pages)
	}
	if _, err := tryRestore(t, dir, SnapshotOptions{Config: c}); !errors.Is(err, snapshot.ErrFormat) {
		t.Errorf("again: %v", err)
	}
}

// TestRestoreNoRoom: what the host has no memory for is refused before it is read,
// and nothing is left.
func TestRestoreNoRoom(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.None)
	root := t.TempDir()
	available := func(kib int) {
		text := fmt.Sprintf("MemAvailable: %d kB\nSwapFree: 0 kB\n", kib)
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "proc"), 0o700), os.WriteFile(filepath.Join(root, "proc/meminfo"), []byte(text), 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	fds := countFDs(t)
	available(64)
	for _, mode := range []RestoreMode{RestoreLazy, RestoreEager, RestorePrefetch} {
		m, err := tryRestore(t, dir, SnapshotOptions{Config: c, Mode: mode, root: root})
		if err == nil {
			_ = m.Close()
		}
		if !errors.Is(err, ErrNoMemory) || !strings.Contains(err.Error(), "0 MiB are available") {
			t.Errorf("%s: %v", mode, err)
		}
		if now := countFDs(t); now != fds {
			t.Errorf("%s: %d descriptors after the failure, %d before", mode, now, fds)
		}
	}
	available(128 << 10)
	if m := restoreFrom(t, dir, SnapshotOptions{Config: c, Mode: RestoreEager, root: root}); digestMemory(t, m) != was {
		t.Error("memory is another")
	}
}

// TestRestoreWithoutKernel: what a guest booted is needed when it boots again,
// and not before.
func TestRestoreWithoutKernel(t *testing.T) {
	c := config.Default()
	c.Kernel = filepath.Join(t.TempDir(), "vmlinuz")
	var closers closers
	source, err := openSource(&c, &closers)
	if err == nil || source.missing == nil || !strings.Contains(source.missing.Error(), c.Kernel) || source.cmdline == "" {
		t.Errorf("source %+v, %v", source, err)
	}

	w := writerConfig()
	dir, _ := savedWriter(t, w, snapshot.None)
	m := restoreFrom(t, dir, SnapshotOptions{Config: w})
	m.source.missing = source.missing
	ctx := deadline(t)
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 100)
	m.request(requestReset)
	exit, err := m.Wait(ctx)
	if err != nil || exit.Reason != ExitFailed || !strings.Contains(exit.Err.Error(), c.Kernel) || !strings.Contains(exit.Err.Error(), "restart") {
		t.Errorf("exit %+v, %v, want one that names the kernel", exit, err)
	}
}

// TestRestoreSnapshotRefuses: a failure leaves nothing open.
func TestRestoreSnapshotRefuses(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.Zstd)
	fds := countFDs(t)
	for _, change := range []func(*config.Config){
		func(c *config.Config) { c.Memory.Size *= 2 },
		func(c *config.Config) { c.CPUs = 2 },
		func(c *config.Config) { c.Disks = []config.Disk{{Path: "/absent"}} },
	} {
		altered := c
		change(&altered)
		set, err := snapshot.CreateWorkingSet(dir)
		if err != nil || set == nil {
			t.Fatal(set, err)
		}
		m, err := tryRestore(t, dir, SnapshotOptions{Config: altered, WorkingSet: set})
		if err == nil {
			_ = m.Close()
			t.Error("no error")
		}
		if now := countFDs(t); now != fds {
			t.Errorf("%d descriptors after the failure, %d before", now, fds)
		}
	}
}
