package live

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"ditto.vm/images/layer"
	"ditto.vm/migration/wire"
)

// fakeDisk is a disk of a VM at the source: a base that nobody writes, and an
// overlay, block by block. What the guest writes is noted when it is there.
type fakeDisk struct {
	t     testing.TB
	base  []byte
	fetch bool // the destination lacks the base

	mu      sync.Mutex
	content []byte
	own     map[int]bool // blocks that the overlay holds
	armed   bool
	noted   map[int]bool
	images  []Image
	sent    map[int]int // how often a block was read

	// What arrives, by image.
	got     [2][]byte
	ended   [2]bool
	wrong   error  // of the destination
	stalled func() // before a write there
}

const (
	fakeBlock  = 64 << 10
	fakeBlocks = 100
)

func newFakeDisk(t testing.TB, fetch bool) *fakeDisk {
	d := &fakeDisk{t: t, fetch: fetch, own: map[int]bool{}, noted: map[int]bool{}, sent: map[int]int{}}
	d.base = make([]byte, fakeBlocks*fakeBlock)
	for i := range fakeBlocks {
		if i%3 != 0 { // the others are zeros
			copy(d.base[i*fakeBlock:], fmt.Sprintf("base block %d", i))
		}
	}
	d.content = bytes.Clone(d.base)
	for i := range 20 {
		d.write(i*2, []byte("early"))
	}
	return d
}

// write writes a block as a guest does: the disk has it before it is noted.
func (d *fakeDisk) write(i int, b []byte) {
	d.mu.Lock()
	clear(d.content[i*fakeBlock:][:fakeBlock])
	copy(d.content[i*fakeBlock:], b)
	d.own[i] = true
	d.mu.Unlock()
	d.mu.Lock()
	if d.armed {
		d.noted[i] = true
	}
	d.mu.Unlock()
}

func (d *fakeDisk) Describe(_ context.Context, o *Offer) error {
	disk := Disk{Path: "/d", Format: "qcow2", Size: int64(len(d.base))}
	if o.Storage == StorageCopied {
		disk.Layers = []DiskLayer{{Path: "/d", Format: "qcow2", Size: disk.Size}, {ID: layer.NewWritten(), Path: "/b", Format: "raw", Size: disk.Size}}
	}
	o.Disks = []Disk{disk}
	return nil
}

func (d *fakeDisk) Arm(images []Image) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.images, d.armed = images, true
	return nil
}

func (d *fakeDisk) Disarm() {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.armed {
		d.t.Error("disarmed twice")
	}
	d.armed = false
}

func (d *fakeDisk) Extents(ctx context.Context, image int, visit func(Extent) error) error {
	for i := range fakeBlocks {
		d.mu.Lock()
		own := d.images[image].Depth == 1 || d.own[i]
		d.mu.Unlock()
		if !own {
			continue
		}
		if err := errors.Join(ctx.Err(), visit(Extent{Offset: int64(i) * fakeBlock, Length: fakeBlock})); err != nil {
			return err
		}
	}
	return nil
}

func (d *fakeDisk) ReadBlocks(image int, p []byte, offset int64) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.sent[int(offset/fakeBlock)]++
	from := d.content
	if d.images[image].Depth == 1 {
		from = d.base
	}
	copy(p, from[offset:])
	return nil
}

func (d *fakeDisk) CollectBlocks(image int, visit func(offset, length int64) error) error {
	d.mu.Lock()
	noted := d.noted
	d.noted = map[int]bool{}
	d.mu.Unlock()
	for i := range noted {
		if err := visit(int64(i)*fakeBlock, fakeBlock); err != nil {
			return err
		}
	}
	return nil
}

func (d *fakeDisk) WrittenBlocks() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return int64(len(d.noted)) * fakeBlock
}

// Images implements [BlockTarget].
func (d *fakeDisk) Images() []Image {
	top := Image{Disk: 0, Depth: 0, Floor: 1}
	if d.fetch {
		d.got = [2][]byte{make([]byte, len(d.base)), nil}
		return []Image{{Disk: 0, Depth: 1, Floor: wire.NoFloor}, top}
	}
	d.got = [2][]byte{bytes.Clone(d.base), nil}
	return []Image{top}
}

func (d *fakeDisk) WriteBlocks(image int, p []byte, offset int64) error {
	if d.stalled != nil {
		d.stalled()
	}
	copy(d.into(image)[offset:], p)
	return d.wrong
}

func (d *fakeDisk) ZeroBlocks(image int, offset, length int64) error {
	clear(d.into(image)[offset:][:length])
	return nil
}

// into is what an image is written to: an overlay begins as what is below it.
func (d *fakeDisk) into(image int) []byte {
	if d.got[image] == nil {
		d.got[image] = bytes.Clone(d.got[0])
	}
	return d.got[image]
}

func (d *fakeDisk) EndImage(_ context.Context, image int) error {
	d.ended[image] = true
	if d.fetch && image == 0 && !bytes.Equal(d.got[0], d.base) {
		return errors.New("the base is another")
	}
	return nil
}

// same holds what arrived to what the source has.
func (d *fakeDisk) same() {
	top := d.got[0]
	if d.fetch {
		top = d.into(1)
	}
	differ := 0
	for i := range fakeBlocks {
		if !bytes.Equal(top[i*fakeBlock:][:fakeBlock], d.content[i*fakeBlock:][:fakeBlock]) {
			differ++
		}
	}
	if differ > 0 {
		d.t.Errorf("%d blocks differ at the switch-over", differ)
	}
}

// Blocks implements [SourceVM].
func (vm *fakeVM) Blocks() BlockSource {
	if vm.w.disk == nil {
		return nil
	}
	return vm.w.disk
}

// Blocks implements [Arrival].
func (h *fakeHost) Blocks() BlockTarget {
	if h.w.disk == nil {
		return nil
	}
	return h.w.disk
}

// TestDisks copies disks whose guests write them all the time, with bases that the
// destination has, and others that are fetched. At the switch-over they are the
// same, and what the overlay does not hold did not travel.
func TestDisks(t *testing.T) {
	again := 0
	for seed := range uint64(12) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			random := rand.New(rand.NewPCG(seed, 3))
			w := newWorld(t, 100)
			d := newFakeDisk(t, seed%2 == 1)
			w.disk = d
			if seed%3 == 0 {
				d.stalled = func() { time.Sleep(100 * time.Microsecond) }
			}
			vm := newFakeVM(w, 4<<20)
			vm.fill(seed)
			memory := writer(seed, 20*time.Microsecond)
			vm.guest = func(ctx context.Context, vm *fakeVM) {
				var wg sync.WaitGroup
				defer wg.Wait()
				wg.Go(func() { memory(ctx, vm) })
				for n := 0; ctx.Err() == nil; n++ {
					d.write(random.IntN(fakeBlocks/2), fmt.Appendf(nil, "late %d", n)[:n%6])
					time.Sleep(100 * time.Microsecond)
				}
			}
			h := &fakeHost{w: w}
			sameAtSwitch(vm, h)
			pages := h.same
			h.same = func() { pages(); d.same() }
			vm.startFirst()
			o := Options{
				Connections: int(seed) % 3, Disks: StorageCopied, CopyLayers: d.fetch, Downtime: 1,
				Timeout: 60 * time.Millisecond, OnTimeout: TimeoutStop, NoThrottle: true,
			}
			e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{})
			if e.sendErr != nil || e.recvErr != nil || !h.runs() {
				t.Fatalf("source: %v, destination: %v", e.sendErr, e.recvErr)
			}
			if e.report.Sent.Disk == 0 || e.report.Sent.Disk > e.report.Sent.Total || d.armed {
				t.Errorf("%+v, armed: %t", e.report.Sent, d.armed)
			}
			for i, n := range d.sent {
				again = max(again, n)
				if !d.fetch && i >= fakeBlocks/2 && i%2 == 1 {
					t.Errorf("block %d, which the destination has, was sent %d times", i, n)
				}
			}
		})
	}
	if again < 3 {
		t.Errorf("no block was written while it was copied: one was sent %d times at most", again)
	}
}

// TestDisksFail: whatever goes wrong, the VM stays, and the other side is told why.
func TestDisksFail(t *testing.T) {
	for _, c := range []struct {
		name  string
		spoil func(d *fakeDisk, o *Options, h *fakeHost)
		want  string
	}{
		{"layers are not to be copied", func(_ *fakeDisk, o *Options, _ *fakeHost) { o.CopyLayers = false }, "layers are not to be copied"},
		{"the disk is full", func(d *fakeDisk, _ *Options, _ *fakeHost) { d.wrong = errors.New("no space left") }, "no space left"},
		{"the base is another", func(d *fakeDisk, _ *Options, _ *fakeHost) {
			d.base[0]++
			d.got[0] = nil
			d.stalled = func() { d.got[0][1]++ }
		}, "the base is another"},
		{"it cannot be made", func(_ *fakeDisk, _ *Options, h *fakeHost) { h.construct = errors.New("no such device") }, "no such device"},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newWorld(t, 100)
			w.disk = newFakeDisk(t, true)
			vm := newFakeVM(w, 2<<20)
			h, o := &fakeHost{w: w}, Options{Disks: StorageCopied, CopyLayers: true}
			c.spoil(w.disk, &o, h)
			vm.startFirst()
			e := move(t.Context(), vm, h, loopback(t), o, ReceiveOptions{})
			if e.sendErr == nil || !strings.Contains(e.sendErr.Error(), c.want) || e.recvErr == nil {
				t.Errorf("source: %v, destination: %v", e.sendErr, e.recvErr)
			}
			if !vm.runs() || h.runs() || h.abandoned != 1 || w.disk.armed {
				t.Errorf("it runs: %t, there: %t, freed %d times, armed: %t", vm.runs(), h.runs(), h.abandoned, w.disk.armed)
			}
		})
	}
}
