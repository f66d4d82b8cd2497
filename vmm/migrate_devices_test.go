package vmm

import (
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"ditto.vm/images/chain"
	"ditto.vm/memory"
	"ditto.vm/migration/live"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// framePeer listens for one network, and hands out the frames that come.
func framePeer(t testing.TB) (path string, frames <-chan []byte) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "net.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	out, done := make(chan []byte, 64), make(chan struct{})
	go func() {
		defer close(done)
		defer close(out)
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		for {
			var size [4]byte
			if _, err := io.ReadFull(c, size[:]); err != nil {
				return
			}
			frame := make([]byte, binary.BigEndian.Uint32(size[:]))
			if _, err := io.ReadFull(c, frame); err != nil {
				return
			}
			out <- frame
		}
	}()
	t.Cleanup(func() { _ = l.Close(); <-done })
	return path, out
}

// TestMigrateAnnounces: a guest that has arrived is announced to its network, by
// its address, several times, and its disks and networks are in the slots in which
// they were.
func TestMigrateAnnounces(t *testing.T) {
	c := fullConfig(t, "memwriter:size=2M")
	c.Memory.Size = 32 << 20
	c.Nets = []config.Net{{Mode: config.NetSocket, Path: deafPeer(t)}}
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	attach(t, m, "net0")
	runUntil(t, m, 100)
	mac := m.pci.devices[1].info.MAC
	path, frames := framePeer(t)
	l := newLanding(t)
	l.Configure = func(o live.Offer) (config.Config, error) {
		c, err := config.Parse(o.Config)
		c.Name, c.Nets[0].Path = "another", path
		return c, err
	}
	f := fly(t, m.MigrationSource(), l, live.Options{Connections: 1})
	if f.err != nil || f.arrived != nil {
		t.Fatalf("source: %v; destination: %v", f.err, f.arrived)
	}
	defer l.vm.Close()
	for n := range 1 + moreAnnouncements {
		select {
		case frame := <-frames:
			const rarp = 0x8035
			if from := net.HardwareAddr(frame[6:12]).String(); from != mac || binary.BigEndian.Uint16(frame[12:]) != rarp {
				t.Fatalf("frame %d is from %s, of type %#x; the guest's address is %s", n, from, frame[12:14], mac)
			}
		case <-deadline(t).Done():
			t.Fatalf("%d announcements", n)
		}
	}
	if l.vm.Info().Name != "another" {
		t.Errorf("its name is %s", l.vm.Info().Name)
	}
	for i, d := range m.pci.devices {
		here := l.vm.pci.devices[i].info
		if here.Name != d.info.Name || here.Address != d.info.Address || here.MAC != d.info.MAC {
			t.Errorf("%+v is %+v now", d.info, here)
		}
	}
	finishWriter(t, l.vm)
}

// TestMigrateLargeFrames: what was large is large again.
func TestMigrateLargeFrames(t *testing.T) {
	c := payloadConfig("memwriter:size=96M,words=8,order=random,seed=5")
	c.Memory.Size = 128 << 20
	m := newVM(t, c, newConsole())
	if why, cure := LargePagesMissing("/"); why != "" || m.keeper == nil {
		t.Skipf("%s; try: %s", why, cure)
	}
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	runUntil(t, m, 200_000)
	large := func(m *VM) int {
		if err := m.refreshFrames(); err != nil {
			t.Fatal(err)
		}
		return m.frames.Census().Large()
	}
	await(t, deadline(t), "memory is large", func() bool { return large(m) >= 40 })
	before := large(m)
	there, _ := migrated(t, m, live.Options{Connections: 2})
	arrived := large(there)
	began := time.Now()
	await(t, deadline(t), "memory is large again", func() bool { return large(there) >= before*95/100 })
	t.Logf("%d large frames, %d when it arrived, %d after %s", before, arrived, large(there), time.Since(began))
	finishWriter(t, there)
}

// slowPages has pages of a memory, some of which come late.
type slowPages struct {
	mem  *memory.Space
	read atomic.Int64
}

// ReadPages implements [memory.PageSource].
func (s *slowPages) ReadPages(gfn memory.GFN, dst []byte) error {
	s.read.Add(int64(len(dst) / memory.PageSize))
	return s.mem.ReadAt(dst, gfn.GPA())
}

// Row implements [memory.PageSource].
func (s *slowPages) Row(gfn memory.GFN) memory.Range {
	return memory.Range{Start: gfn.GPA(), Size: memory.PageSize}
}

// TestConstructMissing: a VM of which pages are still where it was goes on, and
// what it touches comes. What was here of these pages is old, and is not used.
func TestConstructMissing(t *testing.T) {
	for _, tracker := range []memory.TrackerKind{memory.TrackerWPAsync, memory.TrackerKVMLog} {
		t.Run(tracker.String(), func(t *testing.T) {
			c := fullConfig(t, "memwriter:size=16M,words=16,order=random,seed=5")
			c.Memory.Size, c.Memory.Tracker = 64<<20, tracker
			m := newVM(t, c, newConsole())
			ctx := deadline(t)
			if err := m.Start(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, m, 20_000)
			s := m.MigrationSource()
			offer, err := s.Offer(ctx)
			if err != nil {
				t.Fatal(err)
			}
			a, err := (Destination{Options: Options{Console: newConsole()}}).Prepare(ctx, offer)
			if err != nil {
				t.Fatal(err)
			}
			if err := errors.Join(s.Begin(ctx), copyOf(s.Memory())(a.Memory())); err != nil {
				t.Fatal(err)
			}
			if err := s.Pause(ctx); err != nil {
				t.Fatal(err)
			}
			sections, err := s.State(ctx)
			if err != nil {
				t.Fatal(err)
			}
			missing := m.mem.NewPageSet()
			if err := errors.Join(s.Collect(missing), s.ReleaseDisks(ctx)); err != nil {
				t.Fatal(err)
			}
			rng := rand.New(rand.NewPCG(1, 2))
			for range 2000 { // and some that were not written
				missing.Add(memory.GPA(rng.Uint64N(m.mem.Size()))&^(memory.PageSize-1), memory.PageSize)
			}
			source := &slowPages{mem: m.mem}
			if err := a.Construct(ctx, sections, missing, source); errors.Is(err, memory.ErrUnsupported) {
				_ = errors.Join(a.Abandon(), s.ReclaimDisks(ctx), s.Resume(ctx), s.End())
				t.Skipf("%v; try: run as root", err)
			} else if err != nil {
				t.Fatal(err)
			}
			here := a.(*Arrival).VM()
			defer here.Close()
			if err := a.Run(ctx); err != nil {
				t.Fatal(err)
			}
			runUntil(t, here, 20_000)
			await(t, ctx, "all pages come", here.pulled.Done)
			finishWriter(t, here)
			if source.read.Load() == 0 {
				t.Error("no page was asked for")
			}
			if err := s.End(); err != nil {
				t.Fatal(err)
			}
			s.Left("here")
		})
	}
}

// TestArrivalLayers: names are read from disks and boot files that are here, from
// others not, and a written disk is found as the one that is written.
func TestArrivalLayers(t *testing.T) {
	c := fullConfig(t, "memwriter:size=2M")
	top := filepath.Join(t.TempDir(), "top.qcow2")
	if err := chain.CreateOverlay(top, c.Disks[0].Path, chain.Raw, 1<<20); err != nil {
		t.Fatal(err)
	}
	c.Disks[0] = config.Disk{Path: top, Format: chain.Qcow2}
	m := newVM(t, c, newConsole())
	if err := m.Start(deadline(t)); err != nil {
		t.Fatal(err)
	}
	o, err := m.MigrationSource().Offer(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	written := 0
	for _, l := range o.Layers {
		if l.Disk != 0 || l.Written != (l.Depth == 0) {
			t.Errorf("layer %+v", l)
		}
		if l.Written {
			written++
		}
	}
	if len(o.Layers) != 2 || written != 1 {
		t.Fatalf("layers %+v", o.Layers)
	}
	// One that claims to be a boot file is none, whatever it is.
	o.Layers = append(o.Layers, live.Layer{Path: "/etc/passwd", Format: "raw", Size: 1, Disk: -1}, o.Layers[0])
	o.Layers[3].Depth, o.Layers[3].Written = 7, false
	a, err := PrepareArrival(t.Context(), o, c, Options{Console: newConsole()})
	if err != nil {
		t.Fatal(err)
	}
	for i, held := range []bool{true, true, false, false} {
		if (a.Layer(i) != nil) != held {
			t.Errorf("layer %d is here: %t", i, !held)
		}
	}
	if a.Layer(-1) != nil || a.Layer(4) != nil {
		t.Error("layers that nobody offered")
	}
	populated := 0
	for _, r := range a.Memory().Regions() {
		if err := a.Memory().Populated(r.Range, func(memory.Range) { populated++ }); err != nil {
			t.Error(err)
		}
	}
	if populated > 0 {
		t.Errorf("%d runs of memory hold something before anything came", populated)
	}
	if err := a.Run(t.Context()); err == nil {
		t.Error("it runs before it was constructed")
	}
	if err := errors.Join(a.Abandon(), a.Abandon()); err != nil {
		t.Error(err)
	}
	if m.Info().State != api.Running {
		t.Errorf("the source is %s", m.Info().State)
	}
}
