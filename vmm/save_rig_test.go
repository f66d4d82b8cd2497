package vmm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/memory"
	"ditto.vm/migration/snapshot"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/savehost"
)

// saveRig is a machine that is saved: a memory writer at full speed, and a disk
// that a test drives.
type saveRig struct {
	t       *testing.T
	m       *VM
	c       config.Config
	content []byte               // of the disk, as far as tests keep it
	drivers []*virtiotest.Driver // of the disks that are written
	dir     string               // for snapshots
	watch   *peekTracker
	// overwritten counts the blocks and pages that traffic has overwritten.
	overwritten atomic.Int64
}

// saveRAM holds what the disk is read into, from 64 MiB on.
const saveRAM = 96 << 20

// saveSpec is a guest that writes 16 MiB as fast as it can.
const saveSpec = "memwriter:size=16M,words=8,order=random,seed=3"

func newSaveRig(t *testing.T, spec string, change func(c *config.Config)) *saveRig {
	t.Helper()
	c, content := namesConfig(t)
	c.Kernel = PayloadPrefix + spec
	c.Balloon.Enabled = false
	c.Memory.Size = saveRAM
	// Where syncing costs nothing.
	image := filepath.Join(quickDir(t), "disk.img")
	if err := os.WriteFile(image, content, 0o600); err != nil {
		t.Fatal(err)
	}
	c.Disks[0].Path = image
	if change != nil {
		change(&c)
	}
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	r := &saveRig{t: t, m: m, c: c, content: content, dir: quickDir(t)}
	r.watch = &peekTracker{Tracker: m.tracker, space: m.mem}
	m.tracker = r.watch
	for n, d := range c.Disks {
		if n == 0 || !d.ReadOnly {
			r.drivers = append(r.drivers, attachPolled(t, m, n))
		}
	}
	r.runs()
	return r
}

// runs waits until the guest has run, if it writes.
func (r *saveRig) runs() {
	r.t.Helper()
	if strings.HasPrefix(r.m.cfg.Kernel, PayloadPrefix+"memwriter") {
		runUntil(r.t, r.m, 1000)
	}
}

// local begins a snapshot in the rig's folder.
func (r *saveRig) local(name, parent string) *savehost.Local {
	r.t.Helper()
	if parent != "" {
		parent = filepath.Join(r.dir, parent)
	}
	host, err := savehost.NewLocal(filepath.Join(r.dir, name), savehost.Options{Parent: parent})
	if err != nil {
		r.t.Fatal(err)
	}
	return host
}

// save saves the machine as it runs.
func (r *saveRig) save(name string, o SaveOptions) SaveReport {
	r.t.Helper()
	parent := o.Parent
	if parent != "" {
		o.Parent, o.ParentPath = filepath.Join(r.dir, parent), "../"+parent
	}
	report, err := r.m.Save(deadline(r.t), r.local(name, parent), o)
	if err != nil {
		r.t.Fatal(err)
	}
	return report
}

// open opens a snapshot until the end of the test, and verifies it.
func (r *saveRig) open(name string) *snapshot.Snapshot {
	r.t.Helper()
	s, err := snapshot.Open(filepath.Join(r.dir, name), snapshot.OpenOptions{})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := s.Close(); err != nil {
			r.t.Error(err)
		}
	})
	if err := s.Verify(r.t.Context(), snapshot.LoadOptions{}); err != nil {
		r.t.Error(err)
	}
	return s
}

// check compares a snapshot with what memory was when it was made.
func (r *saveRig) check(s *snapshot.Snapshot, want *memory.Space) {
	r.t.Helper()
	loaded, err := memory.New(memory.Config{Size: want.Size(), HugePages: memory.HugePagesOff})
	if err != nil {
		r.t.Fatal(err)
	}
	defer loaded.Close()
	if err := s.Load(r.t.Context(), loaded, snapshot.LoadOptions{}); err != nil {
		r.t.Fatal(err)
	}
	if differ := differing(r.t, loaded, want); len(differ) > 0 {
		r.t.Errorf("%d pages are not what they were, the first %s", len(differ), differ[0])
	}
}

// differing returns the pages in which two memories differ.
func differing(t testing.TB, a, b *memory.Space) (differ []memory.GFN) {
	t.Helper()
	for _, region := range a.Regions() {
		x, err := a.View(region.Start, region.Size)
		if err != nil {
			t.Fatal(err)
		}
		y, err := b.View(region.Start, region.Size)
		if err != nil {
			t.Fatal(err)
		}
		for at := uint64(0); at < region.Size; at += memory.PageSize {
			if !bytes.Equal(x[at:at+memory.PageSize], y[at:at+memory.PageSize]) {
				differ = append(differ, (region.Start + memory.GPA(at)).GFN())
			}
		}
	}
	return differ
}

// checkRuns makes sure that the machine goes on as if nothing had been.
func (r *saveRig) checkRuns() {
	r.t.Helper()
	if state := r.m.Info().State; state != api.Running {
		r.t.Fatalf("VM is %s", state)
	}
	r.runs()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if b := &r.m.background; b.held || b.cancel == nil || r.m.saving || r.m.parting {
		r.t.Errorf("what works beside the guest stands: held %t; saving %t, parting %t", b.held, r.m.saving, r.m.parting)
	}
}

// images lists what is on the disk, the top first.
func (r *saveRig) images() (names []string) {
	for _, l := range r.m.disks[0].image.Layers() {
		names = append(names, filepath.Base(l.Path()))
	}
	return names
}

// finish ends the guest, which must not find a page that it did not write.
func (r *saveRig) finish() {
	r.t.Helper()
	if err := payload.CommandMemWriter(r.m.mem, payload.CommandFinish); err != nil {
		r.t.Fatal(err)
	}
	exit, err := r.m.Wait(deadline(r.t))
	if err != nil || exit.Reason != ExitStatus || exit.Status != 0 {
		r.t.Errorf("exit %+v, %v, want status 0", exit, err)
	}
}

func mustStatus(t *testing.T, m *VM) payload.MemWriterStatus {
	t.Helper()
	status, err := payload.ReadMemWriter(m.mem)
	if err != nil {
		t.Fatal(err)
	}
	return status
}

// restore makes a VM of a snapshot, with overlays on its disks.
func (r *saveRig) restore(s *snapshot.Snapshot) *VM {
	r.t.Helper()
	c, err := config.Parse(s.Manifest().Config)
	if err != nil {
		r.t.Fatal(err)
	}
	for i := range c.Disks {
		d := &c.Disks[i]
		if _, err := chain.Open(d.Path, chain.Options{Format: d.Format}); !errors.Is(err, disk.ErrFrozen) {
			r.t.Errorf("disk %s may be written: %v", d.Path, err)
		}
		top := filepath.Join(quickDir(r.t), "top.qcow2")
		if err := chain.CreateOverlay(top, d.Path, d.Format, namesDisk); err != nil {
			r.t.Fatal(err)
		}
		d.Path, d.Format = top, chain.Qcow2
	}
	m, err := Restore(r.t.Context(), c, s.Sections(), func(space *memory.Space) error {
		return s.Load(r.t.Context(), space, snapshot.LoadOptions{})
	}, RestoreOptions{Options: Options{Console: newConsole()}, NewGenerationID: true})
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(func() {
		if err := m.Close(); err != nil {
			r.t.Error(err)
		}
	})
	return m
}

func buildIndex(t *testing.T, path string) {
	t.Helper()
	c, err := chain.Open(path, chain.Options{ReadOnly: true, Format: chain.Raw})
	if err != nil {
		t.Fatal(err)
	}
	_, err = index.Build(t.Context(), c.Layers()[0], index.Beside(path), index.Options{})
	if err := errors.Join(err, c.Close()); err != nil {
		t.Fatal(err)
	}
}

// listDir lists a folder's files with their permissions.
func listDir(t *testing.T, dir string) (files []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, fmt.Sprintf("%s %s", e.Name(), info.Mode()))
	}
	return files
}

// checkUndone makes sure that a save that failed has left nothing.
func (r *saveRig) checkUndone(images, files, snapshots []string) {
	r.t.Helper()
	r.checkRuns()
	if got := r.images(); !slices.Equal(got, images) {
		r.t.Errorf("the disk is %v, it was %v", got, images)
	}
	if got := listDir(r.t, filepath.Dir(r.c.Disks[0].Path)); !slices.Equal(got, files) {
		r.t.Errorf("beside the disk is %v, there was %v", got, files)
	}
	if got := listDir(r.t, r.dir); !slices.Equal(got, snapshots) {
		r.t.Errorf("in the folder of snapshots is %v, there was %v", got, snapshots)
	}
	if got := r.m.pci.devices[0].info.Backend; got != r.m.disks[0].image.Path() {
		r.t.Errorf("the disk is said to be %s", got)
	}
}

// awaitClosed waits until Close has begun to wait for those who look at memory.
func (r *saveRig) awaitClosed() {
	for {
		r.m.looks.mu.Lock()
		closed := r.m.looks.closed
		r.m.looks.mu.Unlock()
		if closed {
			return
		}
		time.Sleep(time.Millisecond)
	}
}
