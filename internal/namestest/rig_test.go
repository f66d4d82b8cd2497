package namestest_test

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
	"ditto.vm/vmm/naming"
)

const (
	page  = memory.PageSize
	frame = memory.LargeFrameSize

	// dataStart is where the memory begins that disks read and write: behind
	// what drivers allocate and the image of a payload.
	dataStart  = 4 << 20
	memorySize = 24 << 20

	diskBlocks = 512
	diskSize   = diskBlocks * names.BlockSize
)

// rig is a disk, memory that is named, and what is needed to compare them.
type rig struct {
	t       testing.TB
	space   *memory.Space
	tracker memory.Tracker // without names
	frames  *memory.Frames
	naming  *naming.Naming

	path   string
	second *os.File // on the image
	dev    *blk.Device
	driver *virtiotest.Driver
	queues []*queue
}

// rigConfig says what is special about a rig. Nil functions change nothing.
type rigConfig struct {
	cache   disk.Cache
	queues  int
	tracker memory.Tracker // of the Space
	// arrived hears of each request of a queue and may hold it.
	arrived func(queue int, p *passage)
	broken  mutant
}

// mutant leaves out, delays or hurries one hook. Nil functions break nothing.
type mutant struct {
	observer func(blk.Observer) blk.Observer
	tracker  func(memory.Tracker) memory.Tracker
	// host returns who hears of the VMM's writes: of the tracker without names,
	// and of the one with them, which should.
	host func(below, named memory.Tracker) memory.WriteObserver
	// around lets whoever tracks besides naming use the tracker below it.
	around bool
	// stored hears of stores of the vCPU.
	stored func()
}

// newSpace makes populated memory; large pages where the host has them.
func newSpace(t testing.TB) *memory.Space {
	space, err := memory.New(memory.Config{Size: memorySize})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, space.Close()) })
	for gpa := memory.GPA(0); gpa < memorySize; gpa += frame {
		check(t, space.WriteAt([]byte{1}, gpa))
	}
	return space
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eagerPolicy proves as soon as it may.
func eagerPolicy() names.ProverPolicy {
	return names.ProverPolicy{
		Interval: time.Millisecond, Quiet: 2 * time.Millisecond,
		Window: 512, Hashes: 64, Collapse: 64, Fill: 512, Read: 64 << 20,
	}
}

func newRig(t testing.TB, space *memory.Space, c rigConfig) *rig {
	t.Helper()
	r := &rig{t: t, space: space, tracker: c.tracker, path: filepath.Join(t.TempDir(), "disk.raw")}
	content := make([]byte, diskSize)
	_, _ = rand.NewChaCha8([32]byte{7}).Read(content)
	check(t, os.WriteFile(r.path, content, 0o600))
	var err error
	r.second, err = os.OpenFile(r.path, os.O_RDWR, 0)
	check(t, err)
	t.Cleanup(func() { r.second.Close() })

	log := slog.New(slog.DiscardHandler)
	r.frames, err = memory.NewFrames(space, c.tracker)
	check(t, err)
	t.Cleanup(func() { check(t, r.frames.Close()) })
	if c.broken.tracker != nil {
		c.tracker = c.broken.tracker(c.tracker)
	}
	r.naming = naming.New(space, c.tracker, r.frames, log, naming.Options{Policy: eagerPolicy()})
	if c.broken.host != nil {
		space.SetObserver(c.broken.host(r.tracker, r.naming.Tracker()))
	}
	if !c.broken.around {
		r.tracker = r.naming.Tracker()
	}
	t.Cleanup(func() {
		check(t, r.naming.Close())
		space.SetObserver(nil)
	})
	r.addDisk(c)
	return r
}

// addDisk opens the image and starts its device.
func (r *rig) addDisk(c rigConfig) {
	t := r.t
	image, err := chain.Open(r.path, chain.Options{Cache: c.cache, Format: chain.Raw})
	var unusable *disk.Error
	if errors.As(err, &unusable) && c.cache == disk.CacheNone {
		t.Skipf("%v; try: TMPDIR on a disk file system", err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, image.Close()) })
	// It is right only until the first write: from then on it misleads.
	r.index()
	told, err := r.naming.AddDisk(image)
	check(t, err)
	observer := blk.Observer(told)
	if c.broken.observer != nil {
		observer = c.broken.observer(observer)
	}
	n := 0
	r.dev, err = blk.New(blk.Config{
		Size: diskSize, Queues: c.queues, QueueSize: queueSize, Observer: observer,
		NewIOQueue: func(depth int) (blk.IOQueue, error) {
			q, err := image.NewQueue(depth)
			if err != nil || c.arrived == nil {
				return q, err
			}
			index := n
			n++
			return newGates(t, q, func(p *passage) { c.arrived(index, p) }), nil
		},
	})
	check(t, err)
	t.Cleanup(func() { check(t, r.dev.Close()) })
	r.driver = virtiotest.NewMachineOn(t, r.space).NewDriver(t, r.dev)
	r.driver.Start(blk.FeatureFlush|blk.FeatureDiscard|blk.FeatureWriteZeroes|blk.FeatureMultiqueue|blk.FeatureConfigWCE, queueSize)
	for i := range c.queues {
		r.queues = append(r.queues, newQueue(r.driver, i))
	}
}

// index indexes the image.
func (r *rig) index() {
	src, err := layer.OpenFile(r.path)
	check(r.t, err)
	defer src.Close()
	_, err = index.Build(context.Background(), src, index.Beside(r.path), index.Options{})
	check(r.t, err)
}

// image reads all of the image by the second descriptor. What lies beyond its end
// is nil.
func (r *rig) image() []byte {
	r.t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(r.second, 0, diskSize))
	check(r.t, err)
	return b
}

// resize cuts the disk or lets it grow, in the order that the device asks for.
func (r *rig) resize(blocks int64) {
	r.t.Helper()
	size := blocks * names.BlockSize
	if size > r.dev.Size() {
		check(r.t, r.second.Truncate(size))
		check(r.t, r.dev.Resize(size))
		return
	}
	check(r.t, r.dev.Resize(size))
	check(r.t, r.second.Truncate(size))
}

// settle stops the prover and drains the device: what is proven is true then.
// It undoes so when the caller is done.
func (r *rig) settle() (resume func()) {
	r.t.Helper()
	r.naming.Stop()
	r.dev.Pause()
	check(r.t, r.naming.Settle(context.Background()))
	return r.dev.Resume
}

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }
