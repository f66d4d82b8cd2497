package vmm

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/config"
)

// quickDir is a folder where syncing costs nothing, if there is one.
func quickDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "restore-test-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// snapshotOf makes a snapshot of a paused machine, named by its disks, which
// nobody writes.
func snapshotOf(t testing.TB, m *VM, dir string, c snapshot.Compression) {
	t.Helper()
	target, err := snapshot.NewTarget(dir)
	if err != nil {
		t.Fatal(err)
	}
	text, err := json.Marshal(&m.cfg)
	if err != nil {
		t.Fatal(err)
	}
	o := snapshot.Options{Space: m.mem, Ditto: "test", Config: text, Compression: c}
	pass := names.Pass{Space: m.mem}
	if m.naming != nil {
		o.Layers = m.naming.Sources()
		pass.Table, pass.Layers = m.naming.Table(), m.naming.Table().Layers()
	}
	w, err := snapshot.Create(target, o)
	if err != nil {
		t.Fatal(err)
	}
	all, err := pass.Run(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Capture(t.Context(), snapshot.Capture{Map: all}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Commit(t.Context(), saveOf(t, m)); err != nil {
		t.Fatal(err)
	}
}

// restoreFrom makes a machine of a snapshot, which the test closes.
func restoreFrom(t testing.TB, dir string, o SnapshotOptions) *VM {
	t.Helper()
	m, err := tryRestore(t, dir, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

func tryRestore(t testing.TB, dir string, o SnapshotOptions) (*VM, error) {
	t.Helper()
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		return nil, err
	}
	if o.Log == nil {
		o.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	o.Console = newConsole()
	return RestoreSnapshot(t.Context(), s, o)
}

// digestMemory is over all bytes of guest memory.
func digestMemory(t testing.TB, m *VM) [32]byte {
	t.Helper()
	return digestSpace(t, m.mem)
}

// digestSpace is over all bytes of guest memory.
func digestSpace(t testing.TB, space *memory.Space) [32]byte {
	t.Helper()
	h := sha256.New()
	for _, r := range space.Regions() {
		for at := r.Start; at < r.End(); at += memory.LargeFrameSize {
			b, err := space.View(at, min(memory.LargeFrameSize, uint64(r.End()-at)))
			if err != nil {
				t.Fatal(err)
			}
			h.Write(b)
		}
	}
	return [32]byte(h.Sum(nil))
}

// digestFiles is over all files of a folder, but what a restore writes there.
func digestFiles(t testing.TB, dir string) [32]byte {
	t.Helper()
	h := sha256.New()
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || d.Name() == snapshot.WorkingSet {
			return err
		}
		b, err := os.ReadFile(path)
		fmt.Fprintf(h, "%s %d\n", path, len(b))
		h.Write(b)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return [32]byte(h.Sum(nil))
}

// writerConfig is a machine whose guest writes pages in no order and knows what
// they must hold: long rows and single pages, between pages of zeros.
func writerConfig() config.Config {
	c := payloadConfig("memwriter:size=48M,words=300,order=hot,seed=9")
	c.Memory.Size = 64 << 20
	return c
}

// savedWriter lets such a machine run and returns a snapshot of it, and what its
// memory was.
func savedWriter(t testing.TB, c config.Config, compression snapshot.Compression) (dir string, was [32]byte) {
	t.Helper()
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 6000)
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(quickDir(t), "snap")
	was = digestMemory(t, m)
	snapshotOf(t, m, dir, compression)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return dir, was
}

// finishWriter lets the guest check its memory and end.
func finishWriter(t testing.TB, m *VM) {
	t.Helper()
	if err := payload.CommandMemWriter(m.mem, payload.CommandFinish); err != nil {
		t.Fatal(err)
	}
	exit, err := m.Wait(deadline(t))
	if err != nil || exit.Reason != ExitStatus || exit.Status != 0 {
		t.Fatalf("exit %+v, %v, want status 0", exit, err)
	}
	if s, err := payload.ReadMemWriter(m.mem); err != nil || s.Errors != 0 || s.Checks != 1 {
		t.Errorf("status %+v, %v", s, err)
	}
}

// alterPage changes a byte of a page's stored bytes, or cuts the file there.
func alterPages(t testing.TB, dir string, change func(f *os.File, size int64) error) {
	t.Helper()
	f, err := os.OpenFile(filepath.Join(dir, "pages"), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	info, err := f.Stat()
	if err == nil {
		err = change(f, info.Size())
	}
	if err != nil {
		t.Fatal(err)
	}
}

// restoredConfig is the configuration of a machine that is restored: that of the
// snapshot, with overlays on the disks.
func restoredConfig(t *testing.T, dir string) config.Config {
	t.Helper()
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	c, err := config.Parse(s.Manifest().Config)
	if err := errors.Join(err, s.Close()); err != nil {
		t.Fatal(err)
	}
	tops := quickDir(t)
	for i := range c.Disks {
		d := &c.Disks[i]
		if d.ReadOnly {
			continue
		}
		top := filepath.Join(tops, fmt.Sprintf("top%d.qcow2", i))
		if err := chain.CreateOverlay(top, d.Path, d.Format, namesDisk); err != nil {
			t.Fatal(err)
		}
		d.Path, d.Format = top, chain.Qcow2
	}
	return c
}
