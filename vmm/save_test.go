package vmm

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/guest/payload"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/internal/labtest"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
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

// ioHeader is where the header and the status of requests of the first disk lie;
// those of the next ones follow, each 1 MiB further. The rings lie 512 KiB before.
const ioHeader memory.GPA = 2<<20 + 512<<10

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

// attachPolled plays the driver of a disk without interrupts, so that waiting
// for it writes no memory.
func attachPolled(t *testing.T, m *VM, disk int) *virtiotest.Driver {
	t.Helper()
	machine := &virtiotest.Machine{Memory: m.mem, Ports: &m.ports, MMIO: &m.mmio, Log: m.log}
	driver := machine.Attach(t, m.pci.devices[disk].PCIDevice, 1+disk)
	driver.Reset()
	driver.Negotiate(^uint64(0) &^ (virtio.FeatureEventIdx | virtio.FeatureIndirectDesc))
	driver.SetupQueues(16)
	driver.SetStatus(virtio.StatusDriverOK)
	return driver
}

// io makes one request of the first disk and waits for it.
func (r *saveRig) io(kind uint32, offset int64, buffer memory.Range) error {
	r.t.Helper()
	return r.ioOf(0, kind, offset, buffer)
}

// ioOf makes one request of a disk and waits for it. Like a guest it touches
// memory only while the VM runs.
func (r *saveRig) ioOf(disk int, kind uint32, offset int64, buffer memory.Range) error {
	r.t.Helper()
	q := r.drivers[disk].Queue(0)
	head := ioHeader + memory.GPA(disk)<<20
	status := head + 64
	header := binary.LittleEndian.AppendUint32(nil, kind)
	header = binary.LittleEndian.AppendUint64(append(header, 0, 0, 0, 0), uint64(offset/512))
	id := uint16(0)
	for ran := false; !ran; {
		r.m.mu.Lock()
		if r.m.state == api.Stopped {
			r.m.mu.Unlock()
			return errEnded
		}
		if ran = r.m.state == api.Running; ran {
			if err := r.m.mem.WriteAt(header, head); err != nil {
				r.t.Fatal(err)
			}
			id = q.Add(false, virtiotest.Segment{GPA: head, Len: 16},
				virtiotest.Segment{GPA: buffer.Start, Len: int(buffer.Size), Write: kind == 0},
				virtiotest.Segment{GPA: status, Len: 1, Write: true})
			q.Kick()
			// Trackers over KVM's logs do not see what a test writes.
			desc, _, used := q.Rings()
			r.m.mem.Wrote(desc, uint64(used-desc)+4096)
		}
		r.m.mu.Unlock()
		if !ran {
			time.Sleep(time.Millisecond)
		}
	}
	for end := time.Now().Add(virtiotest.Patience); !q.Done(id); {
		select {
		case <-r.m.ended:
			return errEnded
		default:
		}
		if q.Reap() == 0 {
			time.Sleep(20 * time.Microsecond)
		}
		if time.Now().After(end) {
			return errors.New("the disk does not answer")
		}
	}
	if got, err := r.m.mem.View(status, 1); err != nil || got[0] != 0 {
		return fmt.Errorf("request %d of %d bytes at %d: status %v, %w", kind, buffer.Size, offset, got, err)
	}
	return nil
}

// read and write move n blocks between the disk and the buffers' page.
func (r *saveRig) read(block, page, n int) {
	r.t.Helper()
	if err := r.io(0, int64(block)*memory.PageSize, r.buffer(page, n)); err != nil && !errors.Is(err, errEnded) {
		r.t.Error(err)
	}
}

func (r *saveRig) write(block, page, n int) {
	r.t.Helper()
	b := r.buffer(page, n)
	if err := r.io(1, int64(block)*memory.PageSize, b); err != nil {
		if !errors.Is(err, errEnded) {
			r.t.Error(err)
		}
		return
	}
	src, err := r.m.mem.View(b.Start, b.Size)
	if err != nil {
		r.t.Fatal(err)
	}
	copy(r.content[block*memory.PageSize:], src)
}

func (r *saveRig) buffer(page, n int) memory.Range {
	return memory.Range{Start: namesBuffers + memory.GPA(page)*memory.PageSize, Size: uint64(n) * memory.PageSize}
}

// store changes a page of the buffers as a vCPU does.
func (r *saveRig) store(page int, value byte) {
	r.t.Helper()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	b, err := r.m.mem.Writable(namesBuffers+memory.GPA(page)*memory.PageSize, memory.PageSize)
	if err != nil {
		r.t.Fatal(err)
	}
	if r.m.state == api.Running {
		b[100] = value
		r.m.mem.Wrote(namesBuffers+memory.GPA(page)*memory.PageSize, 1)
	}
}

// readAll brings all of the disk into the buffers.
func (r *saveRig) readAll() {
	r.t.Helper()
	const piece = 64
	for at := 0; at < namesDisk/memory.PageSize; at += piece {
		r.read(at, at, piece)
	}
}

// traffic reads and writes the disk and stores into the buffers at random, until
// stop is called.
func (r *saveRig) traffic(seed uint64) (stop func()) {
	done := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		rng := rand.New(rand.NewPCG(seed, 2))
		const pages = namesDisk / memory.PageSize
		for {
			select {
			case <-done:
				return
			default:
			}
			n := 1 + rng.IntN(8)
			block, page := rng.IntN(pages-n), rng.IntN(pages-n)
			switch rng.IntN(4) {
			case 0:
				r.write(block, page, n)
			case 1:
				r.store(page, byte(rng.Uint32()))
			default:
				r.read(block, page, n)
			}
			r.overwritten.Add(int64(n))
		}
	})
	stop = sync.OnceFunc(func() {
		close(done)
		wg.Wait()
	})
	r.t.Cleanup(stop)
	return stop
}

// peekTracker knows when a save is at which step: it collects to see what is
// written while the guest runs, and peeks in the pause.
type peekTracker struct {
	memory.Tracker
	space *memory.Space
	// rearm is called before each collection of the lowest region while the
	// guest runs, with its number; 0 arms.
	rearm func(n int)
	peek  func()        // likewise, in the pause
	dump  *memory.Space // of memory in the pause
	n     int
	err   error
}

func (p *peekTracker) Collect(r memory.Range, into *memory.PageSet, mode memory.CollectMode) error {
	if r.Start == 0 && mode == memory.Rearm {
		if p.rearm != nil {
			p.rearm(p.n)
		}
		p.n++
	}
	if r.Start == 0 && mode == memory.Peek {
		if p.peek != nil {
			p.peek()
		}
		if p.dump != nil { // another looked too
			p.err = p.dump.Close()
		}
		if p.dump, p.err = memory.New(memory.Config{Size: p.space.Size(), HugePages: memory.HugePagesOff}); p.err == nil {
			p.err = copyOf(p.space)(p.dump)
		}
	}
	return errors.Join(p.err, p.Tracker.Collect(r, into, mode))
}

// takeDump returns what memory was in the pause, until the end of the test.
func (p *peekTracker) takeDump(t *testing.T) *memory.Space {
	t.Helper()
	if p.dump == nil {
		t.Fatal("memory was not collected in a pause")
	}
	d := p.dump
	p.dump, p.n = nil, 0
	t.Cleanup(func() { d.Close() })
	return d
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

// TestSave saves a guest that writes at full speed, and a disk that is read and
// written meanwhile, again and again, and compares each snapshot with what memory
// was in the pause.
func TestSave(t *testing.T) {
	type variant struct {
		names       bool
		tracker     memory.TrackerKind
		compression snapshot.Compression
		child       bool
	}
	for _, v := range []variant{
		{true, memory.TrackerWPAsync, snapshot.None, true}, {true, memory.TrackerWPAsync, snapshot.Zstd, false},
		{false, memory.TrackerWPAsync, snapshot.None, false}, {false, memory.TrackerWPAsync, snapshot.Zstd, true},
		{true, memory.TrackerKVMLog, snapshot.Zstd, true}, {false, memory.TrackerKVMLog, snapshot.None, false},
		{true, memory.TrackerKVMRing, snapshot.None, false},
	} {
		t.Run(fmt.Sprintf("%s,names=%t,%s,child=%t", v.tracker, v.names, v.compression, v.child), func(t *testing.T) {
			r := newSaveRig(t, saveSpec, func(c *config.Config) {
				c.Memory.Names, c.Memory.Tracker = config.OnOff(v.names), v.tracker
			})
			r.readAll()
			parent := ""
			for i := range labtest.Count(2, 10) {
				stop := r.traffic(uint64(i))
				name := fmt.Sprintf("snap%d", i)
				o := SaveOptions{Compression: v.compression}
				if v.child {
					o.Parent = parent
				}
				report := r.save(name, o)
				parent = name
				stop()
				t.Logf("%+v", report)
				s := r.open(name)
				r.check(s, r.watch.takeDump(t))
				r.checkRuns()
				if report.ID != s.ID() || report.Holds != s.Manifest().Holds || report.Rounds < 2 || report.Pause == 0 || report.Stored == 0 {
					t.Errorf("report %+v", report)
				}
				if (s.Parent() != nil) != (o.Parent != "") {
					t.Errorf("the parent is %v", s.Parent())
				}
				if named := report.Holds.Blocks > 0; named != v.names {
					t.Errorf("the snapshot holds %+v", report.Holds)
				}
				if len(r.images()) != i+2 || report.Overlays[0] != r.m.disks[0].image.Path() {
					t.Errorf("the disk is %v, and said to be %v", r.images(), report.Overlays)
				}
			}
			r.finish()
		})
	}
}

// TestSaveRace overwrites blocks and buffers all the time while snapshots are
// made, every other on the one before.
func TestSaveRace(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	stop := r.traffic(77)
	saves := labtest.Count(3, 50)
	var named, pages uint64
	for i := range saves {
		o := SaveOptions{Compression: []snapshot.Compression{snapshot.None, snapshot.Zstd, snapshot.Zstd}[i%3]}
		if i%2 == 1 {
			o.Parent = fmt.Sprintf("snap%d", i-1)
		}
		before := r.overwritten.Load()
		report := r.save(fmt.Sprintf("snap%d", i), o)
		named, pages = named+report.Holds.Blocks/memory.PageSize, pages+uint64(r.overwritten.Load()-before)
		r.check(r.open(fmt.Sprintf("snap%d", i)), r.watch.takeDump(t))
		await(t, deadline(t), "blocks and buffers are overwritten", func() bool { return r.overwritten.Load() > int64(i+1)*1000 })
	}
	stop()
	r.finish()
	if named == 0 || pages == 0 {
		t.Errorf("%d pages were named by blocks, %d overwritten during the saves", named, pages)
	}
	if !t.Failed() {
		labtest.Proof(t, "snapshot-race", "%d snapshots of a guest that writes at full speed while %d blocks and buffers of its disk were overwritten, %d of them during the saves: %d pages named by blocks, none not what it was in the pause",
			saves, r.overwritten.Load(), pages, named)
	}
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

// TestSaveGoesOn: what was saved runs, from a snapshot of a snapshot, with the
// disk that it had.
func TestSaveGoesOn(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	r.write(3, 200, 5)
	r.save("first", SaveOptions{})
	want := slices.Clone(r.content)
	r.write(4, 300, 5) // is not in the disk that was saved
	s := r.open("first")
	m := r.restore(s)
	got := make([]byte, namesDisk)
	if err := m.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, want) {
		t.Errorf("the disk is not what it was, %v", err)
	}
	before := mustStatus(t, m)
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 1000)
	other := &saveRig{t: t, m: m, c: m.cfg, content: want, dir: r.dir}
	other.save("second", SaveOptions{Parent: "first"})
	other.finish()
	r.finish()

	again := r.restore(r.open("second"))
	if now := mustStatus(t, again); now.Writes <= before.Writes {
		t.Errorf("%d writes in the second snapshot, %d in the first", now.Writes, before.Writes)
	}
	if err := again.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	(&saveRig{t: t, m: again}).finish()
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

// TestSaveConfig: the manifest says how to make the machine again.
func TestSaveConfig(t *testing.T) {
	r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Disks[0].Serial = "A1" })
	r.save("snap", SaveOptions{})
	s := r.open("snap")
	got, err := config.Parse(s.Manifest().Config)
	if err != nil {
		t.Fatal(err)
	}
	want := r.c
	want.Nets = []config.Net{}
	want.Disks[0].Format = chain.Raw
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, l, ok := s.Locate(got.Disks[0].Path); !ok || l.Format != string(chain.Raw) || l.Stamp == (snapshot.Stamp{}) {
		t.Errorf("the disk is not among the layers: %+v", s.Manifest().Layers)
	}
	// The next one is of what was stacked.
	r.save("next", SaveOptions{})
	if got, err = config.Parse(r.open("next").Manifest().Config); err != nil || got.Disks[0].Format != chain.Qcow2 || got.Disks[0].Path == want.Disks[0].Path {
		t.Errorf("its disks are %+v, %v", got.Disks, err)
	}
	r.finish()
}

// TestSaveMeetsWrites: what happens to a page or its block between any two steps
// of a save is in the snapshot.
func TestSaveMeetsWrites(t *testing.T) {
	for name, do := range map[string]func(r *saveRig){
		"block written":             func(r *saveRig) { r.write(10, 500, 1) },
		"block written with zeros":  func(r *saveRig) { r.write(10, 6000, 1) },
		"page written":              func(r *saveRig) { r.store(10, 7) },
		"page read into":            func(r *saveRig) { r.read(20, 10, 1) },
		"page written to its block": func(r *saveRig) { r.write(10, 10, 1) },
		"page and block":            func(r *saveRig) { r.store(10, 9); r.write(10, 10, 1) },
		"block moved":               func(r *saveRig) { r.write(10, 500, 1); r.read(10, 600, 1); r.read(11, 10, 1) },
		"page discarded": func(r *saveRig) {
			if err := r.m.mem.Discard(r.buffer(10, 1).Start, memory.PageSize); err != nil {
				r.t.Error(err)
			}
		},
		"equal page written": func(r *saveRig) { r.store(5000, 3) },
		"restart":            func(r *saveRig) { r.m.request(requestReset) },
		"looked at": func(r *saveRig) {
			if _, err := r.m.Memory(r.t.Context(), api.MemoryQuery{Full: true, Pause: true}); err != nil {
				r.t.Error(err)
			}
		},
		"paused and resumed": func(r *saveRig) {
			if err := errors.Join(r.m.Pause(r.t.Context()), r.m.Resume(r.t.Context())); err != nil {
				r.t.Error(err)
			}
			r.m.mu.Lock()
			defer r.m.mu.Unlock()
			if r.m.background.cancel != nil {
				r.t.Error("the prover may arm frames while memory is saved")
			}
		},
	} {
		// Before each collection, and when all pages were just named.
		const named = 3
		for step := range named + 1 {
			t.Run(fmt.Sprintf("%s/%d", name, step), func(t *testing.T) {
				r := newSaveRig(t, "spin", nil)
				r.readAll()
				r.equalPages()
				r.watch.rearm = func(n int) {
					if n == step {
						do(r)
					}
				}
				var once sync.Once
				r.save("snap", SaveOptions{Progress: func(p SaveProgress) {
					if step == named && p.Phase == SaveMemory && p.Done == p.Total/2 {
						once.Do(func() { do(r) })
					}
				}})
				if r.watch.n < 3 {
					t.Fatalf("the save has %d collections", r.watch.n)
				}
				r.check(r.open("snap"), r.watch.takeDump(t))
			})
		}
	}
}

// TestSaveAfterRestart: a restart that the guest has asked for is no part of a
// state, and goes first.
func TestSaveAfterRestart(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.watch.peek = func() {
		if r.m.resetDue.Load() {
			t.Error("a machine that is to restart was captured")
		}
	}
	var served sync.WaitGroup
	r.save("snap", SaveOptions{Progress: func(p SaveProgress) {
		if p.Phase == SavePause {
			r.m.resetDue.Store(true)
			served.Go(func() {
				time.Sleep(5 * standAgain) // in place of the supervisor
				r.m.resetDue.Store(false)
			})
		}
	}})
	served.Wait()
	r.check(r.open("snap"), r.watch.takeDump(t))
	r.finish()
}

// TestSaveDoubts: more pages equal a block than names of it are kept; that it is
// written later must not change them.
func TestSaveDoubts(t *testing.T) {
	r := newSaveRig(t, "spin", func(c *config.Config) { buildIndex(t, c.Disks[0].Path) })
	for page := range 100 {
		if err := r.m.mem.WriteAt(r.content[10*memory.PageSize:][:memory.PageSize], r.buffer(page, 1).Start); err != nil {
			t.Fatal(err)
		}
	}
	r.watch.rearm = func(n int) {
		if n == 1 {
			r.write(10, 500, 1)
		}
	}
	r.save("snap", SaveOptions{})
	r.check(r.open("snap"), r.watch.takeDump(t))
}

// equalPages makes pages 5000 to 5003 of the buffers equal.
func (r *saveRig) equalPages() {
	r.t.Helper()
	b := bytes.Repeat([]byte("same"), memory.PageSize)
	if err := r.m.mem.WriteAt(b, r.buffer(5000, 4).Start); err != nil {
		r.t.Fatal(err)
	}
}

// TestSaveNamesTheLowest: pages that the base holds are named by the base, with
// its identity by content, and what was written since by the layer above.
func TestSaveNamesTheLowest(t *testing.T) {
	var base string
	r := newSaveRig(t, "spin", func(c *config.Config) {
		base = c.Disks[0].Path
		buildIndex(t, base)
		top := filepath.Join(quickDir(t), "root.qcow2")
		if err := chain.CreateOverlay(top, base, chain.Raw, namesDisk); err != nil {
			t.Fatal(err)
		}
		c.Disks[0].Path = top
	})
	b := r.buffer(7000, 3)
	page := bytes.Repeat([]byte("mine"), int(b.Size)/4)
	if err := r.m.mem.WriteAt(page, b.Start); err != nil {
		t.Fatal(err)
	}
	r.write(1000, 7000, 3)
	r.readAll()
	report := r.save("snap", SaveOptions{})
	s := r.open("snap")
	r.check(s, r.watch.takeDump(t))
	held := map[string]uint64{}
	for _, run := range s.Runs() {
		if run.Kind == snapshot.Block {
			held[s.Manifest().Layers[run.Layer].Path] += run.Pages
		}
	}
	// A cluster of the overlay holds 16 blocks.
	if whole := uint64(namesDisk / memory.PageSize); held[base] < whole-32 || held[r.c.Disks[0].Path] < 3 || held[base]+held[r.c.Disks[0].Path] < whole {
		t.Errorf("blocks by layer: %v", held)
	}
	index, err := index.Open(index.Beside(base))
	if err != nil {
		t.Fatal(err)
	}
	defer index.Close()
	if l := s.Manifest().Layers[0]; l.Path != base || l.ID != index.LayerID() {
		t.Errorf("the base is %+v, its index is of %s", l, index.LayerID())
	}
	if report.Holds.Unique > 1<<20 {
		t.Errorf("the snapshot of a guest that does nothing holds %+v", report.Holds)
	}
	// What is stacked on it now names nothing yet; a second one finds it all.
	again := r.save("again", SaveOptions{Parent: "snap"})
	if again.Holds.Unique > 1<<20 || again.Stored > 1<<20 {
		t.Errorf("the second holds %+v in %d bytes", again.Holds, again.Stored)
	}
	r.check(r.open("again"), r.watch.takeDump(t))
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

// TestSavePaused: a VM that is paused stays so, and one that is paused for the
// save runs on.
func TestSavePaused(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	report := r.save("first", SaveOptions{Paused: true})
	r.check(r.open("first"), r.watch.takeDump(t))
	r.checkRuns()
	if report.Pause == 0 || report.Pause < report.Took/4 {
		t.Errorf("paused for %s of %s", report.Pause, report.Took)
	}
	if err := r.m.Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := mustStatus(t, r.m)
	report = r.save("second", SaveOptions{})
	r.check(r.open("second"), r.watch.takeDump(t))
	if state := r.m.Info().State; state != api.Paused || report.Pause != 0 {
		t.Errorf("a paused VM is %s after it was saved, and was paused for %s", state, report.Pause)
	}
	if now := mustStatus(t, r.m); now.Writes != before.Writes {
		t.Error("a paused VM ran while it was saved")
	}
	if err := r.m.Resume(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.checkRuns()
	r.finish()
}

// TestSaveUntracked: without a tracker all of it is done in the pause.
func TestSaveUntracked(t *testing.T) {
	r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Memory.Tracker = memory.TrackerNone })
	r.readAll()
	report := r.save("snap", SaveOptions{Compression: snapshot.Zstd})
	s := r.open("snap")
	if report.Rounds != 0 || report.Holds.Blocks < namesDisk {
		t.Errorf("report %+v", report)
	}
	r.checkRuns()
	m := r.restore(s)
	if err := m.Resume(deadline(t)); err != nil {
		t.Fatal(err)
	}
	(&saveRig{t: t, m: m}).finish()
	r.finish()
}

// TestSaveStop: the VM ends when it is saved, its disk is frozen and has no
// overlay.
func TestSaveStop(t *testing.T) {
	for _, names := range []bool{true, false} {
		r := newSaveRig(t, saveSpec, func(c *config.Config) { c.Memory.Names = config.OnOff(names) })
		r.readAll()
		r.write(7, 100, 3)
		report := r.save("snap", SaveOptions{Stop: true, Progress: func(p SaveProgress) {
			if p.Phase == SaveCommit {
				if err := r.m.Resume(t.Context()); !errors.Is(err, api.ErrWrongState) {
					t.Errorf("what is saved and is to end runs on: %v", err)
				}
			}
		}})
		exit, err := r.m.Wait(deadline(t))
		if err != nil || exit.Reason != ExitSaved {
			t.Fatalf("exit %+v, %v", exit, err)
		}
		if err := r.m.Close(); err != nil {
			t.Fatal(err)
		}
		if report.Overlays[0] != "" {
			t.Errorf("overlays %v", report.Overlays)
		}
		path := r.c.Disks[0].Path
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, r.content) {
			t.Errorf("the disk is not what it was, %v", err)
		}
		if files := listDir(t, filepath.Dir(path)); !slices.Equal(files, []string{filepath.Base(path) + " -r--------"}) {
			t.Errorf("beside the disk is %v", files)
		}
		s := r.open("snap")
		r.check(s, r.watch.takeDump(t))
		if err := s.CheckLayers(t.Context()); err != nil {
			t.Error(err)
		}
		m := r.restore(s)
		if err := m.Resume(deadline(t)); err != nil {
			t.Fatal(err)
		}
		(&saveRig{t: t, m: m}).finish()
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

// hookHost calls a function before each thing that is asked of it, which fails
// with what that returns.
type hookHost struct {
	SaveHost
	mu   sync.Mutex
	hook func(what string) error
}

func (h *hookHost) call(what string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.hook(what)
}

func (h *hookHost) Create(name string) (*os.File, error) {
	if err := h.call("create " + name); err != nil {
		return nil, err
	}
	return h.SaveHost.Create(name)
}

func (h *hookHost) Commit() error {
	if err := h.call("commit"); err != nil {
		return err
	}
	return h.SaveHost.Commit()
}

func (h *hookHost) Overlay(ctx context.Context, o savehost.OverlayRequest) (savehost.Overlay, error) {
	if err := h.call("overlay"); err != nil {
		return savehost.Overlay{}, err
	}
	return h.SaveHost.Overlay(ctx, o)
}

func (h *hookHost) OpenSnapshotFile(dir, name string) (*os.File, error) {
	if err := h.call("open " + name); err != nil {
		return nil, err
	}
	return h.SaveHost.OpenSnapshotFile(dir, name)
}

var errHost = errors.New("the host fails")

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

// TestSaveFails: whatever the host cannot do, the VM goes on, with its disk as
// it was.
func TestSaveFails(t *testing.T) {
	for _, tc := range []struct {
		o      SaveOptions
		qcow2  bool
		direct bool
	}{
		{o: SaveOptions{Compression: snapshot.Zstd}},
		{o: SaveOptions{Parent: "parent"}, qcow2: true},
		{o: SaveOptions{Stop: true}, qcow2: true},
		{o: SaveOptions{Paused: true}, direct: true},
	} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			r := newSaveRig(t, saveSpec, func(c *config.Config) {
				if tc.direct { // which memory cannot
					image := filepath.Join(t.TempDir(), "disk.img")
					content, err := os.ReadFile(c.Disks[0].Path)
					if err := errors.Join(err, os.WriteFile(image, content, 0o600)); err != nil {
						t.Fatal(err)
					}
					c.Disks[0].Path, c.Disks[0].Cache = image, disk.CacheNone
				}
				if tc.qcow2 {
					path := filepath.Join(quickDir(t), "top.qcow2")
					if err := chain.CreateOverlay(path, c.Disks[0].Path, chain.Raw, namesDisk); err != nil {
						t.Fatal(err)
					}
					c.Disks[0].Path = path
				}
			})
			r.readAll()
			o := tc.o
			if o.Parent != "" {
				r.save(o.Parent, SaveOptions{})
				r.watch.takeDump(t)
				o.Parent, o.ParentPath = filepath.Join(r.dir, o.Parent), "../"+o.Parent
			}
			images, files, snapshots := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path)), listDir(t, r.dir)
			var asked []string
			for n := 0; ; n++ {
				asked = asked[:0]
				host := &hookHost{SaveHost: r.local("snap", tc.o.Parent)}
				host.hook = func(what string) error {
					asked = append(asked, what)
					if len(asked) == n+1 {
						if strings.HasPrefix(what, "create pagemap") && !tc.o.Stop {
							r.write(60, 70, 9) // goes into the overlay
						}
						return errHost
					}
					return nil
				}
				_, err := r.m.Save(deadline(t), host, o)
				if err == nil {
					break
				}
				if !errors.Is(err, errHost) || errors.Is(err, context.Canceled) {
					t.Fatalf("%s: %v", asked[n], err)
				}
				r.checkUndone(images, files, snapshots)
				r.watch.dump, r.watch.n = nil, 0
				r.write(50+n, 30+n, 5)
				r.read(20+n, 90+n, 5)
			}
			want := []string{"overlay", "create pages", "create pagemap", "create sections/machine", "create manifest.json", "commit"}
			if o.Parent != "" {
				want = append([]string{"open manifest.json", "open pagemap", "open pages"}, want...)
			}
			for _, what := range want {
				if !slices.Contains(asked, what) {
					t.Errorf("the host was never asked to %s: %v", what, asked)
				}
			}
			s := r.open("snap")
			r.check(s, r.watch.takeDump(t))
			got := make([]byte, namesDisk)
			if err := r.m.disks[0].image.ReadAtv([][]byte{got}, 0); err != nil || !bytes.Equal(got, r.content) {
				t.Errorf("the disk lost what was written, %v", err)
			}
		})
	}
}

// TestSaveDiskFull: a disk that is full in the middle of a save is said to be so,
// the machine goes on with its disk, and there is room again.
func TestSaveDiskFull(t *testing.T) {
	mount := t.TempDir()
	if err := unix.Mount("none", mount, "tmpfs", 0, "size=8m"); err != nil {
		t.Skipf("mount a small file system: %v (try: run as root)", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	for _, tc := range []SaveOptions{{}, {Paused: true}, {Stop: true}, {Compression: snapshot.Zstd}} {
		t.Run(fmt.Sprintf("%+v", tc), func(t *testing.T) {
			r := newSaveRig(t, "memwriter:size=16M,words=512,order=random,seed=3", nil)
			r.readAll()
			runUntil(t, r.m, 20000)
			images, files := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
			host, err := savehost.NewLocal(filepath.Join(mount, "snap"), savehost.Options{})
			if err != nil {
				t.Fatal(err)
			}
			// Some of it fits.
			if _, err := r.m.Save(deadline(t), host, tc); !errors.Is(err, snapshot.ErrNoSpace) || !strings.Contains(err.Error(), mount) {
				t.Errorf("%v", err)
			}
			r.checkUndone(images, files, nil)
			if left := listDir(t, mount); len(left) > 0 {
				t.Errorf("left: %v", left)
			}
			r.watch.dump, r.watch.n = nil, 0
			r.write(9, 20, 3)
			r.save("elsewhere", SaveOptions{})
			r.check(r.open("elsewhere"), r.watch.takeDump(t))
			r.finish()
		})
	}
}

// TestSaveInDoubt: a snapshot that may be complete keeps what it needs.
func TestSaveInDoubt(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	host := &hookHost{SaveHost: r.local("snap", "")}
	host.hook = func(what string) error {
		if what != "commit" {
			return nil
		}
		return errors.Join(host.SaveHost.Commit(), savehost.ErrInDoubt)
	}
	if _, err := r.m.Save(deadline(t), host, SaveOptions{}); !errors.Is(err, savehost.ErrInDoubt) {
		t.Fatal(err)
	}
	r.checkRuns()
	r.write(9, 20, 3)
	if got := r.images(); len(got) != 2 {
		t.Errorf("the disk is %v", got)
	}
	s := r.open("snap")
	r.check(s, r.watch.takeDump(t))
	if err := s.CheckLayers(t.Context()); err != nil {
		t.Error(err)
	}
	r.finish()
}

// TestSaveCanceled: a save that is canceled at any time leaves nothing.
func TestSaveCanceled(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	r.readAll()
	images, files := r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
	stop := r.traffic(1)
	canceled := 0
	rng := rand.New(rand.NewPCG(5, 5))
	for i := range labtest.Count(20, 300) {
		ctx, cancel := context.WithCancel(deadline(t))
		var timer *time.Timer
		o := SaveOptions{Compression: snapshot.Zstd, Stop: i%5 == 4}
		at := []SavePhase{SavePrepare, SaveMemory, SavePause, SaveCommit}[i%4]
		var once sync.Once
		o.Progress = func(p SaveProgress) {
			if p.Phase == at {
				once.Do(func() { timer = time.AfterFunc(time.Duration(rng.IntN(40))*time.Millisecond, cancel) })
			}
		}
		_, err := r.m.Save(ctx, r.local("snap", ""), o)
		if timer != nil {
			timer.Stop()
		}
		cancel()
		r.watch.dump, r.watch.n = nil, 0
		if err == nil {
			// It was too fast.
			if o.Stop {
				stop = func() {}
				break
			}
			if err := os.RemoveAll(filepath.Join(r.dir, "snap")); err != nil {
				t.Fatal(err)
			}
			images, files = r.images(), listDir(t, filepath.Dir(r.c.Disks[0].Path))
			continue
		}
		if !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		canceled++
		r.checkUndone(images, files, nil)
	}
	if canceled == 0 {
		t.Error("no save was canceled")
	}
	stop()
}

// TestSaveBusy: two saves at once, and what may not happen during one.
func TestSaveBusy(t *testing.T) {
	r := newSaveRig(t, saveSpec, nil)
	host := &hookHost{SaveHost: r.local("one", "")}
	host.hook = func(what string) error {
		if what != "overlay" {
			return nil
		}
		if _, err := r.m.Save(t.Context(), r.local("two", ""), SaveOptions{}); !errors.Is(err, snapshot.ErrBusy) {
			t.Errorf("a second save: %v", err)
		}
		if err := r.m.ResizeDisk(0, namesDisk/2); !errors.Is(err, api.ErrWrongState) {
			t.Errorf("a disk is resized while it is saved: %v", err)
		}
		return nil
	}
	if _, err := r.m.Save(deadline(t), host, SaveOptions{}); err != nil {
		t.Fatal(err)
	}
	r.check(r.open("one"), r.watch.takeDump(t))
	r.checkRuns()
	if files := listDir(t, r.dir); len(files) != 1 {
		t.Errorf("left: %v", files)
	}
	r.finish()
	if _, err := r.m.Save(t.Context(), r.local("three", ""), SaveOptions{}); !errors.Is(err, api.ErrWrongState) {
		t.Errorf("a guest that has ended is saved: %v", err)
	}
	if files := listDir(t, r.dir); len(files) != 1 {
		t.Errorf("left: %v", files)
	}
}

// TestSaveMeetsTheEnd: a guest that ends while its memory is stored is not
// saved; one that ends after it was captured is, and so are those that are closed
// at any time.
func TestSaveMeetsTheEnd(t *testing.T) {
	for _, phase := range []SavePhase{SavePrepare, SaveMemory, SavePause, SaveCommit} {
		for _, closed := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s,closed=%t", phase, closed), func(t *testing.T) {
				r := newSaveRig(t, saveSpec, nil)
				var once sync.Once
				var end sync.WaitGroup
				_, err := r.m.Save(deadline(t), r.local("snap", ""), SaveOptions{Progress: func(p SaveProgress) {
					if p.Phase != phase {
						return
					}
					once.Do(func() {
						r.m.Kill()
						<-r.m.ended
						if closed {
							end.Go(func() {
								if err := r.m.Close(); err != nil {
									t.Error(err)
								}
							})
							r.awaitClosed()
						}
					})
				}})
				end.Wait()
				_, statErr := os.Stat(filepath.Join(r.dir, "snap"))
				if (err == nil) != (statErr == nil) || (phase != SaveCommit || closed) == (err == nil) {
					t.Errorf("saved: %v; there: %v", err, statErr)
				}
				files := listDir(t, filepath.Dir(r.c.Disks[0].Path))
				if err != nil && !slices.Equal(files, []string{"disk.img -rw-------"}) {
					t.Errorf("beside the disk is %v", files)
				}
			})
		}
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

// TestSaveChangedLayer: an image that somebody changes is named by no snapshot.
func TestSaveChangedLayer(t *testing.T) {
	var base string
	r := newSaveRig(t, "spin", func(c *config.Config) {
		base = c.Disks[0].Path
		buildIndex(t, base)
		c.Disks[0].ReadOnly = true
	})
	r.readAll()
	images, files := r.images(), listDir(t, filepath.Dir(base))
	r.watch.rearm = func(n int) {
		if n != 1 {
			return
		}
		f, err := os.OpenFile(base, os.O_RDWR, 0)
		if err != nil {
			t.Error(err)
			return
		}
		defer f.Close()
		if _, err := f.WriteAt([]byte("changed"), 5*memory.PageSize); err != nil {
			t.Error(err)
		}
	}
	if _, err := r.m.Save(deadline(t), r.local("snap", ""), SaveOptions{}); err == nil || !strings.Contains(err.Error(), "try again") {
		t.Errorf("%v", err)
	}
	if got := r.images(); !slices.Equal(got, images) || !slices.Equal(listDir(t, filepath.Dir(base)), files) {
		t.Errorf("the disk is %v in %v", got, listDir(t, filepath.Dir(base)))
	}
	r.watch.rearm = nil
	r.watch.takeDump(t)
	if report := r.save("snap", SaveOptions{}); report.Holds.Blocks != 0 {
		t.Errorf("it holds %+v", report.Holds)
	}
	r.check(r.open("snap"), r.watch.takeDump(t))
}

// TestSaveLetsGo: after a save the guest writes without being noticed, but where
// names are proven.
func TestSaveLetsGo(t *testing.T) {
	for _, on := range []bool{true, false} {
		r := newSaveRig(t, "spin", func(c *config.Config) { c.Memory.Names = config.OnOff(on) })
		if r.m.tracker.Kind() != memory.TrackerWPAsync {
			t.Skip("needs wp-async: Linux 6.7 or newer")
		}
		r.read(0, 0, 64)
		r.store(4000, 1)
		if err := r.m.Pause(t.Context()); err != nil {
			t.Fatal(err)
		}
		large := func() int {
			if r.m.frames == nil {
				return 0
			}
			if err := r.m.refreshFrames(); err != nil {
				t.Fatal(err)
			}
			return r.m.frames.Census().Large()
		}
		before := large()
		r.save("snap", SaveOptions{})
		if after := large(); after < before {
			t.Errorf("%d frames are large after a save that met no writes, %d were before", after, before)
		}
		written := r.m.mem.NewPageSet()
		if err := r.watch.Tracker.Collect(r.m.mem.Regions()[0].Range, written, memory.Peek); err != nil {
			t.Fatal(err)
		}
		if !written.Has(r.buffer(4000, 1).Start) {
			t.Error("a page without a name is armed after the save")
		}
		if on {
			if n := r.m.naming.Table().At(r.buffer(0, 1).Start.GFN()); n.Kind() != names.Block || !n.Proven() || written.Has(r.buffer(0, 1).Start) {
				t.Errorf("page 0 is %s, proven %t, counts as written: %t", n, n.Proven(), written.Has(r.buffer(0, 1).Start))
			}
		}
		if err := r.m.Resume(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
}
