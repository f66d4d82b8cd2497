package vmm

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"ditto.vm/guest/boot"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/naming"
)

// ErrNoTracker is wrapped when the tracker that the configuration asks for
// cannot be had on this host.
var ErrNoTracker = errors.New("use --tracker auto, which takes what this host has")

// ringEntries is the length of each vCPU's dirty ring: 64 MiB of pages written
// between two looks, in 256 KiB of kernel memory.
const ringEntries = 1 << 14

// enableRings gives the vCPUs dirty rings if the configuration asks for them.
// Preconditions: no vCPU is made yet.
func (m *VM) enableRings() error {
	if m.cfg.Memory.Tracker != memory.TrackerKVMRing {
		return nil
	}
	if err := m.kvm.EnableDirtyRings(ringEntries); err != nil {
		return fmt.Errorf("%w: %w", &memory.TrackerError{
			Kind: memory.TrackerKVMRing, Reason: "this KVM has no dirty rings: Linux 5.11 or newer is needed", Err: err,
		}, ErrNoTracker)
	}
	return nil
}

// addTracker opens the tracker of writes to guest memory, and the book of its
// large frames. Preconditions: the vCPUs are made and have not run.
func (m *VM) addTracker() error {
	var host memory.TrackerHost
	if m.cfg.Memory.Tracker == memory.TrackerKVMRing {
		host.Ring = m.kvm
		for _, c := range m.vcpus {
			ring, err := c.kvm.DirtyRing(ringEntries)
			if err != nil {
				return fmt.Errorf("vCPU %d: %w", c.id, err)
			}
			m.cleanup.add(ring.Close)
			host.Rings = append(host.Rings, ring)
		}
	} else {
		host.Log = m.kvm
	}
	tracker, passed, err := memory.OpenTracker(m.mem, m.cfg.Memory.Tracker, host)
	if errors.Is(err, memory.ErrUnsupported) {
		err = fmt.Errorf("%w: %w", err, ErrNoTracker)
	}
	if err != nil {
		return err
	}
	m.tracker = tracker
	m.ring, _ = tracker.(*memory.KVMRing)
	m.cleanup.add(func() error {
		m.mem.SetObserver(nil)
		return tracker.Close()
	})
	if len(passed) > 0 {
		m.log.Warn("written pages are found the slower way", "tracker", tracker.Kind().String(), "err", passed[0])
	}
	if err := m.addFrames(); err != nil {
		return err
	}
	return m.addNaming()
}

// addNaming makes the names of pages, unless they are switched off. From then on
// their tracker is everybody's.
func (m *VM) addNaming() error {
	if !m.cfg.Memory.Names {
		return nil
	}
	var book names.FrameBook
	if m.frames != nil {
		book = m.frames
	}
	policy := names.DefaultProverPolicy()
	// Who asks for KVM's log by name wants it used, whatever it does to large
	// frames.
	policy.WithLog = m.cfg.Memory.Tracker == memory.TrackerKVMLog || m.cfg.Memory.Tracker == memory.TrackerKVMRing
	m.naming = naming.New(m.mem, m.tracker, book, m.log, naming.Options{Policy: policy})
	m.tracker = m.naming.Tracker()
	m.cleanup.add(func() error {
		m.mem.SetObserver(nil)
		return m.naming.Close()
	})
	if image := m.source.kernel; image != nil {
		if err := m.naming.AddFile(boot.SourceKernel, image); err != nil {
			return err
		}
	}
	if image := m.source.initrd; image != nil {
		return m.naming.AddFile(boot.SourceInitrd, image)
	}
	return nil
}

// addFrames opens the book of large frames. Without PAGEMAP_SCAN there is none.
func (m *VM) addFrames() error {
	frames, err := memory.NewFrames(m.mem, m.tracker)
	if errors.Is(err, unix.ENOTTY) {
		m.log.Warn("large frames are neither counted nor made: Linux 6.7 or newer is needed", "err", err)
		return nil
	}
	if err != nil {
		return fmt.Errorf("large frames: %w", err)
	}
	m.frames = frames
	m.cleanup.add(frames.Close)
	if m.mem.Config().HugePages != memory.HugePagesTHP {
		return nil
	}
	if why, cure := LargePagesMissing("/"); why != "" {
		m.log.Warn("guest memory is mapped with small pages", "err", why, "cure", cure)
		return nil
	}
	m.keeper = memory.NewFrameKeeper(frames, memory.DefaultFramePolicy(), m.log)
	return nil
}

// LargePagesMissing says why this host backs no memory with transparent huge
// pages of 2 MiB, and the cure; both are empty when it does. The host's /sys is
// below root.
func LargePagesMissing(root string) (why, cure string) {
	const dir = "sys/kernel/mm/transparent_hugepage"
	global := chosenWord(filepath.Join(root, dir, "enabled"))
	if global == "" {
		return "the kernel has no transparent huge pages", "use a kernel with CONFIG_TRANSPARENT_HUGEPAGE, or --hugepages 2M"
	}
	// Since Linux 6.8 each size has a switch of its own, usually inherit.
	own := chosenWord(filepath.Join(root, dir, "hugepages-2048kB/enabled"))
	switch {
	case own == "never":
		return "transparent huge pages of 2 MiB are off", "echo inherit > /" + dir + "/hugepages-2048kB/enabled, or use --hugepages off if that is meant"
	case (own == "" || own == "inherit") && global == "never":
		return "transparent huge pages are off", "echo madvise > /" + dir + "/enabled, or use --hugepages off if that is meant"
	}
	return "", ""
}

// chosenWord returns the word in brackets of a file of alternatives.
func chosenWord(path string) string {
	text, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	_, rest, _ := strings.Cut(string(text), "[")
	word, _, closed := strings.Cut(rest, "]")
	if !closed {
		return ""
	}
	return word
}

// ringFull makes room in the dirty rings for a vCPU that left the guest for want
// of it.
func (m *VM) ringFull() error {
	if m.ring == nil {
		return fmt.Errorf("dirty ring full with tracker %s: %w", m.tracker.Kind(), unix.EPROTO)
	}
	return m.ring.RingFull()
}

// background is work beside the running guest. It stands still while the guest
// does, so that whoever looks at a paused guest's memory sees it at rest.
type background struct {
	cancel context.CancelFunc // nil while it stands still
	held   bool               // it stands still whatever the guest does
	done   sync.WaitGroup
	loaded []boot.FileRange // to be named after the files it was loaded from
	// announcements to networks that are still to be made.
	announcements int
}

// startBackground lets the work that goes on beside the guest begin.
// Preconditions: mu is held and the guest runs, or is about to.
func (m *VM) startBackground() {
	b := &m.background
	if b.cancel != nil || b.held {
		return
	}
	var ctx context.Context
	ctx, b.cancel = context.WithCancel(context.Background())
	if m.keeper != nil {
		b.done.Go(func() { m.keeper.Run(ctx) })
	}
	if m.restored != nil {
		b.done.Go(func() { m.restored.run(ctx) })
	}
	if m.pulled != nil {
		b.done.Go(func() {
			m.pullRest(ctx)
			m.allPulled()
		})
	}
	if b.announcements > 0 {
		b.done.Go(func() { m.announceAgain(ctx) })
	}
	if m.naming != nil {
		// A millisecond that the guest need not wait for: names are hints, and
		// what the guest has changed by then will not be proven.
		b.done.Go(m.nameLoaded())
		if m.learned != nil {
			b.done.Go(func() { m.learned.teach(ctx, m.naming.Table()) })
		}
		m.naming.Start()
	}
}

// nameLoaded returns what names the memory that was loaded last, once.
// Preconditions: mu is held.
func (m *VM) nameLoaded() func() {
	segments := m.background.loaded
	m.background.loaded = nil
	return func() { m.naming.Loaded(segments) }
}

// stopBackground ends it and waits until it has. The guest may run meanwhile.
// Preconditions: mu is held.
func (m *VM) stopBackground() {
	b := &m.background
	if b.cancel == nil {
		return
	}
	b.cancel()
	if m.naming != nil {
		m.naming.Stop()
	}
	b.done.Wait()
	b.cancel = nil
}

// holdBackground lets it stand still even while the guest runs. Preconditions: mu
// is held.
func (m *VM) holdBackground() {
	m.background.held = true
	m.stopBackground()
}

// releaseBackground undoes holdBackground. Preconditions: mu is held.
func (m *VM) releaseBackground() {
	m.background.held = false
	if m.state == api.Running {
		m.startBackground()
	}
}
