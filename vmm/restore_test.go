package vmm

import (
	"bytes"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/images/layer"
	"ditto.vm/internal/trackertest"
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
	h := sha256.New()
	for _, r := range m.mem.Regions() {
		for at := r.Start; at < r.End(); at += memory.LargeFrameSize {
			b, err := m.mem.View(at, min(memory.LargeFrameSize, uint64(r.End()-at)))
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

// TestRestoreSnapshot: in every mode memory is what it was, the guest goes on and
// finds all that it wrote, and the snapshot is not changed by that.
func TestRestoreSnapshot(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, was := savedWriter(t, c, compression)
		files := digestFiles(t, dir)
		for _, mode := range []RestoreMode{RestoreLazy, RestoreEager, RestorePrefetch} {
			for _, tracker := range []memory.TrackerKind{memory.TrackerAuto, memory.TrackerKVMLog, memory.TrackerNone} {
				t.Run(fmt.Sprintf("%s/%s/%s", compression, mode, tracker), func(t *testing.T) {
					c := c
					c.Memory.Tracker = tracker
					o := SnapshotOptions{Mode: mode, Config: c}
					m := restoreFrom(t, dir, o)
					if now := digestMemory(t, m); now != was {
						t.Error("memory is another")
					}
					if err := m.Close(); err != nil {
						t.Fatal(err)
					}

					// Again, and nobody looks before the guest does.
					m = restoreFrom(t, dir, o)
					stats := m.restored.stats()
					if err := m.Resume(deadline(t)); err != nil {
						t.Fatal(err)
					}
					runUntil(t, m, 3000)
					finishWriter(t, m)
					after := m.restored.stats()
					lazy := mode != RestoreEager
					if lazy && (stats.MissingBytes == 0 || after.CopiedBytes == 0) || lazy && compression == snapshot.None && stats.MappedBytes == 0 || !lazy && stats.CopiedBytes == 0 {
						t.Errorf("before %+v, after %+v", stats, after)
					}
					if digestFiles(t, dir) != files {
						t.Error("the snapshot was changed")
					}
				})
			}
		}
	}
}

// TestRestoreIsComplete: in the end nothing depends on the snapshot but what is
// mapped, and memory that is private is large again.
func TestRestoreIsComplete(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.Zstd)
	m := restoreFrom(t, dir, SnapshotOptions{Config: c})
	ctx := deadline(t)
	if err := payload.CommandMemWriter(m.mem, payload.CommandPause); err != nil {
		t.Fatal(err)
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	await(t, ctx, "all is fetched", m.restored.done.Load)
	if s := m.restored.stats(); s.MissingBytes != 0 {
		t.Errorf("%+v", s)
	}
	if err := os.RemoveAll(dir); err != nil {
		t.Fatal(err)
	}
	if m.keeper != nil {
		await(t, ctx, "frames are large again", func() bool { return m.frames.Census().Large() > 0 })
	}
	if err := errors.Join(m.Pause(ctx), payload.CommandMemWriter(m.mem, payload.CommandRun)); err != nil {
		t.Fatal(err)
	}
	// The guest has written its status page, which says since when.
	if now := digestMemory(t, m); now == was {
		t.Error("the guest did not run")
	}
	if err := m.Resume(ctx); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	finishWriter(t, m)
}

// TestRestoreRestarts: a guest that restarts gets empty memory, whatever was
// mapped or missing.
func TestRestoreRestarts(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, _ := savedWriter(t, c, compression)
		set, err := snapshot.CreateWorkingSet(dir)
		if err != nil || set == nil {
			t.Fatal(set, err)
		}
		m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
		ctx := deadline(t)
		if err := m.Resume(ctx); err != nil {
			t.Fatal(err)
		}
		runUntil(t, m, 100)
		m.request(requestReset)
		await(t, ctx, "restart", func() bool { m.mu.Lock(); defer m.mu.Unlock(); return m.resets > 0 })
		if s := m.restored.stats(); s.MissingBytes != 0 || !m.restored.done.Load() {
			t.Errorf("after the restart %+v", s)
		}
		if again, err := snapshot.CreateWorkingSet(dir); err != nil || again != nil {
			t.Errorf("what was touched before the restart is not recorded, %v", err)
		}
		usage, err := m.mem.HostUsage()
		if err != nil || usage.VMAs > 4 {
			t.Errorf("%d mappings after the restart, %v", usage.VMAs, err)
		}
		runUntil(t, m, 6000)
		finishWriter(t, m)
	}
}

// TestRestoreTracks: after a restore no write escapes the tracker, whether to
// pages that are mapped, missing or new.
func TestRestoreTracks(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.None)
	for _, kind := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog} {
		c.Memory.Tracker = kind
		m := restoreFrom(t, dir, SnapshotOptions{Config: c})
		mirror, err := trackertest.NewMirror(m.mem, m.tracker)
		if err != nil {
			t.Fatal(err)
		}
		ctx := deadline(t)
		for range 5 {
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 500)
			if err := m.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			written, err := mirror.Round(memory.Rearm)
			if err != nil {
				t.Fatal(err)
			}
			if n := written.Count(); n == 0 || n > 12000 {
				t.Errorf("%s: %d pages were written", kind, n)
			}
			if err := mirror.Check(); err != nil {
				t.Fatal(err)
			}
		}
		if err := m.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestRestoreGivesBack: pages of a restored guest that it gives back are zeros,
// whatever they were; the others are what they were.
func TestRestoreGivesBack(t *testing.T) {
	for _, compression := range []snapshot.Compression{snapshot.None, snapshot.Zstd} {
		c := writerConfig()
		dir, _ := savedWriter(t, c, compression)
		files := digestFiles(t, dir)
		m := restoreFrom(t, dir, SnapshotOptions{Config: c})
		twin := restoreFrom(t, dir, SnapshotOptions{Config: c, Mode: RestoreEager})
		const from, to = memory.GPA(4 << 20), memory.GPA(52 << 20)
		for gpa, n := from, uint64(1); gpa+memory.GPA(n*memory.PageSize) < to; gpa, n = gpa+memory.GPA(3*n*memory.PageSize), n%700+1 {
			if err := errors.Join(m.mem.Discard(gpa, n*memory.PageSize), twin.mem.Discard(gpa, n*memory.PageSize)); err != nil {
				t.Fatal(err)
			}
			if n%5 == 0 {
				if err := errors.Join(m.mem.WriteAt([]byte("new"), gpa), twin.mem.WriteAt([]byte("new"), gpa)); err != nil {
					t.Fatal(err)
				}
			}
		}
		for gpa := from; gpa < to; gpa += memory.LargeFrameSize {
			a, err1 := m.mem.View(gpa, memory.LargeFrameSize)
			b, err2 := twin.mem.View(gpa, memory.LargeFrameSize)
			if err := errors.Join(err1, err2); err != nil || !bytes.Equal(a, b) {
				t.Errorf("%s: frame %s differs, %v", compression, gpa, err)
			}
		}
		if digestFiles(t, dir) != files {
			t.Error("the snapshot was changed")
		}
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

// TestRestoreRecords: what the guest touched is recorded once, and the next
// restore has it before the guest asks.
func TestRestoreRecords(t *testing.T) {
	for compression, timely := range map[snapshot.Compression]bool{snapshot.None: true, snapshot.Zstd: false} {
		t.Run(fmt.Sprintf("%s/timely=%v", compression, timely), func(t *testing.T) {
			c := writerConfig()
			dir, _ := savedWriter(t, c, compression)
			set, err := snapshot.CreateWorkingSet(dir)
			if err != nil || set == nil {
				t.Fatal(set, err)
			}
			ctx := deadline(t)
			m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
			if timely {
				m.restored.record.left = 50 * time.Millisecond
			}
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			if err := errors.Join(m.Pause(ctx), m.Resume(ctx)); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			if timely {
				await(t, ctx, "the working set is written", func() bool { return m.restored.done.Load() })
			}
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}

			s, err := snapshot.Open(dir, snapshot.OpenOptions{})
			if err != nil {
				t.Fatal(err)
			}
			runs, err := s.ReadWorkingSet()
			if err = errors.Join(err, s.Close()); err != nil {
				t.Fatal(err)
			}
			m = restoreFrom(t, dir, SnapshotOptions{Config: c})
			before := m.restored.stats()
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
			m = restoreFrom(t, dir, SnapshotOptions{Config: c, Mode: RestorePrefetch})
			<-m.restored.prefetched
			after := m.restored.stats()
			there, all := m.mem.NewPageSet(), uint64(0)
			if err := m.mem.FilesTouched(func(r memory.Range) { there.Add(r.Start, r.Size) }); err != nil {
				t.Fatal(err)
			}
			for _, r := range runs {
				all += r.Size
				if m.restored.missing != nil {
					if err := m.restored.missing.Fetch(ctx, r); err != nil {
						t.Fatal(err)
					}
				}
			}
			if now := m.restored.stats(); now.CopiedBytes != after.CopiedBytes {
				t.Errorf("%d bytes of the working set were still missing", now.CopiedBytes-after.CopiedBytes)
			}
			got := there.Count()*memory.PageSize + before.MissingBytes + before.CopiedBytes - after.MissingBytes
			if all == 0 || all > 40<<20 || got < all {
				t.Errorf("a working set of %d bytes, and %d are there", all, got)
			}
			if err := m.Resume(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 300)
			finishWriter(t, m)
		})
	}
}

// TestRestoreNeverRan: a machine that was restored and never ran records nothing.
func TestRestoreNeverRan(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.None)
	set, err := snapshot.CreateWorkingSet(dir)
	if err != nil || set == nil {
		t.Fatal(set, err)
	}
	m := restoreFrom(t, dir, SnapshotOptions{Config: c, WorkingSet: set})
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	again, err := snapshot.CreateWorkingSet(dir)
	if err != nil || again == nil {
		t.Fatalf("a working set is there: %v", err)
	}
	again.Close()
}

// TestRestoreShared: memory that cannot be mapped from files is read at once, and
// that is announced.
func TestRestoreShared(t *testing.T) {
	c := writerConfig()
	dir, was := savedWriter(t, c, snapshot.None)
	c.Memory.Backing, c.Memory.Tracker = memory.Memfd, memory.TrackerNone
	var log bytes.Buffer
	o := SnapshotOptions{Config: c}
	o.Log = slog.New(slog.NewTextHandler(&log, nil))
	m := restoreFrom(t, dir, o)
	if digestMemory(t, m) != was {
		t.Error("memory is another")
	}
	if n := strings.Count(log.String(), "before the guest runs"); n != 1 {
		t.Errorf("announced %d times: %s", n, &log)
	}
	if s := m.restored.stats(); s.MappedBytes != 0 || s.CopiedBytes == 0 || s.MissingBytes != 0 {
		t.Errorf("%+v", s)
	}
}

// TestRestoreReads: what nobody can fetch at a fault is read before.
func TestRestoreReads(t *testing.T) {
	c := writerConfig()
	dir, _ := savedWriter(t, c, snapshot.Zstd)
	s, err := snapshot.Open(dir, snapshot.OpenOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	space := func() *memory.Space {
		m, err := memory.New(memory.Config{Size: s.Manifest().Memory.Size})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { m.Close() })
		return m
	}
	want, got := space(), space()
	if err := s.Load(t.Context(), want, snapshot.LoadOptions{}); err != nil {
		t.Fatal(err)
	}
	r := &restored{mem: got, pages: s.Pages()}
	defer r.pages.Close()
	var all []memory.Range
	for _, region := range got.Regions() {
		all = append(all, region.Range)
	}
	if err := r.read(t.Context(), all); err != nil {
		t.Fatal(err)
	}
	a, _ := want.View(0, want.Size())
	b, _ := got.View(0, got.Size())
	if !bytes.Equal(a, b) {
		t.Error("memory differs")
	}
}

// TestRestoreNames: pages that equal blocks of a disk are mapped from it, and a
// snapshot of the restored machine knows that again.
func TestRestoreNames(t *testing.T) {
	c, content := namesConfig(t)
	c.Disks[0].ReadOnly = true
	m := newVM(t, c, newConsole())
	ctx := deadline(t)
	if err := m.Start(ctx); err != nil {
		t.Fatal(err)
	}
	readDisk(t, attach(t, m, "blk0"))
	if err := m.Pause(ctx); err != nil {
		t.Fatal(err)
	}
	first := filepath.Join(quickDir(t), "first")
	snapshotOf(t, m, first, snapshot.None)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	m = restoreFrom(t, first, SnapshotOptions{Config: c})
	if s := m.restored.stats(); s.MappedBytes < namesDisk {
		t.Errorf("%+v: the disk's blocks are not mapped", s)
	}
	got, err := m.mem.View(namesBuffers, namesDisk)
	if err != nil || !bytes.Equal(got, content) {
		t.Errorf("what was read from the disk is another, %v", err)
	}
	if !m.restored.teach(ctx) {
		t.Fatal(ctx.Err())
	}
	if named := m.naming.Stats().Named; named < namesDisk/memory.PageSize {
		t.Errorf("%d pages are named", named)
	}
	second := filepath.Join(filepath.Dir(first), "second")
	snapshotOf(t, m, second, snapshot.None)
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	var holds []snapshot.Holds
	for _, dir := range []string{first, second} {
		s, err := snapshot.Open(dir, snapshot.OpenOptions{})
		if err != nil {
			t.Fatal(err)
		}
		holds = append(holds, s.Manifest().Holds)
		// Were the disk the kernel, nothing would be mapped from it.
		for path, copied := range map[string]bool{c.Disks[0].Path: true, dir: false} {
			other := restored{vm: &VM{cfg: config.Config{Kernel: path}}}
			if got := other.bootFiles()(s, 0); got != copied {
				t.Errorf("a disk with the kernel %s: copied %v", path, got)
			}
		}
		s.Close()
	}
	// The page of the generation ID may differ.
	if holds[0] != holds[1] || holds[0].Blocks < namesDisk {
		t.Errorf("the first holds %+v, the second %+v", holds[0], holds[1])
	}
}

// restoreLazily makes a machine of a snapshot, with overlays on its disks.
func (r *saveRig) restoreLazily(name string) *saveRig {
	r.t.Helper()
	s, err := snapshot.Open(filepath.Join(r.dir, name), snapshot.OpenOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	c, err := config.Parse(s.Manifest().Config)
	if err != nil {
		r.t.Fatal(err)
	}
	top := filepath.Join(r.t.TempDir(), "top.qcow2")
	if err := chain.CreateOverlay(top, c.Disks[0].Path, c.Disks[0].Format, namesDisk); err != nil {
		r.t.Fatal(err)
	}
	c.Disks[0].Path, c.Disks[0].Format = top, chain.Qcow2
	if err := s.Close(); err != nil {
		r.t.Fatal(err)
	}
	m := restoreFrom(r.t, filepath.Join(r.dir, name), SnapshotOptions{Config: c, RestoreOptions: RestoreOptions{NewGenerationID: true}})
	return &saveRig{t: r.t, m: m, c: c, content: r.content, dir: r.dir}
}

// TestRestoreSaves: a machine that was restored and runs is saved and restored
// again and again, with most of its memory where it was; none of its pages is ever
// wrong, and a save of one that did nothing stores next to nothing.
func TestRestoreSaves(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	r.save("snap0", SaveOptions{})
	r.finish()
	const rounds = 4
	last := ""
	for i := range rounds {
		last = fmt.Sprintf("snap%d", i)
		r = r.restoreLazily(last)
		if err := r.m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		runUntil(t, r.m, 500)
		o := SaveOptions{Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd}[i%2]}
		if i%2 == 1 {
			o.Parent = last
		}
		report := r.save(fmt.Sprintf("snap%d", i+1), o)
		if held := report.Holds.Blocks + report.Holds.Parent; held < namesDisk {
			t.Errorf("round %d: %+v: the disk's blocks are not known any more", i, report.Holds)
		}
		r.finish()
		if err := r.m.Close(); err != nil {
			t.Fatal(err)
		}
	}

	r = r.restoreLazily("snap0")
	report, err := r.m.Save(deadline(t), r.local("idle", "snap0"), SaveOptions{Parent: filepath.Join(r.dir, "snap0"), ParentPath: "../snap0"})
	if err != nil {
		t.Fatal(err)
	}
	if h := report.Holds; h.Unique > 16*memory.PageSize {
		t.Errorf("a machine that did nothing holds %+v", h)
	}
	idle := r.open("idle")
	r.check(idle, r.m.mem)
	// Its layers are the ones that they were.
	if was, now := usedLayers(r.open("snap0")), usedLayers(idle); len(was) == 0 || !maps.Equal(was, now) {
		t.Errorf("layers by identity were %v and are %v", was, now)
	}
}

// usedLayers are the layers that pages of a snapshot are named by.
func usedLayers(s *snapshot.Snapshot) map[layer.ID]string {
	used := map[layer.ID]string{}
	for _, run := range s.Runs() {
		if run.Kind == snapshot.Block {
			l := s.Manifest().Layers[run.Layer]
			used[l.ID] = l.Path
		}
	}
	return used
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

func TestRestoreModeText(t *testing.T) {
	for m := RestoreLazy; m <= RestorePrefetch; m++ {
		text, err := m.MarshalText()
		var back RestoreMode
		if err != nil || back.UnmarshalText(text) != nil || back != m {
			t.Errorf("%d: text %q read back as %d", m, text, back)
		}
	}
	var m RestoreMode
	if err := m.UnmarshalText([]byte("slow")); err == nil {
		t.Error("an unknown mode was accepted")
	}
}
