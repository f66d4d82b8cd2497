package blk

import (
	"encoding/binary"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"testing"

	"ditto.vm/devices/virtio/virtiotest"
)

// capacity is the disk's size as the driver reads it, in sectors.
func capacity(d *virtiotest.Driver) uint64 {
	return binary.LittleEndian.Uint64(d.DeviceConfig(configCapacity, 8))
}

// readStatus reads one sector.
func readStatus(tb testing.TB, d *virtiotest.Driver, sector uint64) byte {
	tb.Helper()
	_, status := do(tb, d.Queue(0), [][]byte{header(typeIn, sector)}, sectorSize)
	return status
}

// TestResize: the driver is told of another size, may use it, and may not use
// what is gone.
func TestResize(t *testing.T) {
	const most = 1 << 20
	disk := newFakeDisk(most)
	dev := newDevice(t, disk, func(c *Config) { c.Size = most / 2 })
	if err := dev.Resize(most / 4); err != nil { // before any driver
		t.Fatal(err)
	}
	d := start(t, dev)
	config, told := d.Message(-1), 0
	for _, step := range []struct {
		size   int64
		paused bool
	}{
		{most / 4, false}, {most / 2, false}, {most, false}, {most / 8, false}, {most / 2, true}, {sectorSize, false}, {most, false},
	} {
		changed := dev.Size() != step.size
		if step.paused {
			d.Function.Pause()
		}
		if err := dev.Resize(step.size); err != nil {
			t.Fatal(err)
		}
		if step.paused {
			if err := d.Function.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		if changed {
			told++
		}
		if got := d.Machine.MSIs.Count(config); got != told {
			t.Errorf("size %d: %d configuration interrupts, want %d", step.size, got, told)
		}
		end := uint64(step.size / sectorSize)
		if got := capacity(d); got != end {
			t.Errorf("size %d: the driver reads a capacity of %d sectors", step.size, got)
		}
		if status := readStatus(t, d, end-1); status != statusOK {
			t.Errorf("size %d: status %d of the last sector", step.size, status)
		}
		if status := readStatus(t, d, end); status != statusIOError {
			t.Errorf("size %d: status %d behind the end", step.size, status)
		}
	}
	for _, size := range []int64{0, -sectorSize, sectorSize - 1} {
		if err := dev.Resize(size); err == nil || dev.Size() != most {
			t.Errorf("size %d was accepted: %v", size, err)
		}
	}
	d.Reset()
	if err := dev.Resize(most / 2); err != nil {
		t.Fatal(err)
	}
	d.Start(allFeatures, 64)
	if got := capacity(d); got != most/2/sectorSize {
		t.Errorf("a capacity of %d sectors after a reset", got)
	}
}

// TestResizeWaits: a request in flight completes before the observer hears that
// its blocks are gone.
func TestResizeWaits(t *testing.T) {
	disk := newFakeDisk(1 << 20)
	disk.gate = make(chan struct{})
	r := &recorder{disk: disk}
	dev := newDevice(t, disk, func(c *Config) { c.Observer = r })
	d := start(t, dev)
	q := d.Queue(0)
	request := q.Submit([][]byte{header(typeIn, 1<<11-8)}, 4096, statusSize)
	q.Kick()
	for len(disk.seen()) == 0 {
		runtime.Gosched()
	}
	resized := make(chan error, 1)
	go func() { resized <- dev.Resize(4096) }()
	close(disk.gate)
	if err := <-resized; err != nil {
		t.Fatal(err)
	}
	q.Wait(request)
	if got := q.Writable(request); got[4096] != statusOK {
		t.Errorf("status %d of the request in flight", got[4096])
	}
	want := []string{"before read 1044480+4096 note 7", "read", "after read 1044480+4096 note 7 <nil>", "resize 4096"}
	if got := disk.seen(); !slices.Equal(got, want) {
		t.Errorf("order\n%q, want\n%q", got, want)
	}
}

// bounds is an observer that finds requests where none may be.
type bounds struct {
	size             atomic.Int64
	flying           atomic.Int64
	resizes, outside atomic.Int64
	atResize         atomic.Int64 // requests in flight while the size changed
}

func (b *bounds) begin(offset, n int64) {
	b.flying.Add(1)
	if offset+n > b.size.Load() {
		b.outside.Add(1)
	}
}

func (b *bounds) BeforeRead(io *IO)                    { b.begin(io.Offset, int64(len(io.Buffers[0].Data))) }
func (b *bounds) AfterRead(*IO, error)                 { b.flying.Add(-1) }
func (b *bounds) BeforeWrite(io *IO)                   { b.begin(io.Offset, int64(len(io.Buffers[0].Data))) }
func (b *bounds) AfterWrite(*IO, error)                { b.flying.Add(-1) }
func (b *bounds) BeforeErase(offset, n int64)          { b.begin(offset, n) }
func (b *bounds) AfterErase(_ int64, _ int64, _ error) { b.flying.Add(-1) }
func (b *bounds) Resize(size int64) {
	b.resizes.Add(1)
	b.atResize.Add(b.flying.Load())
	b.size.Store(size)
}

// TestResizeUnderLoad: however often the size changes under several queues at
// work, nothing reaches beyond the end or is in flight meanwhile, and every
// request is answered.
func TestResizeUnderLoad(t *testing.T) {
	const most, queues, rounds = 1 << 20, 3, 200
	b := &bounds{}
	b.size.Store(most)
	dev := newDevice(t, newFakeDisk(most), func(c *Config) { c.Queues, c.Observer = queues, b })
	d := start(t, dev)
	stop := make(chan struct{})
	var resizer sync.WaitGroup
	resizer.Go(func() {
		for size := int64(most); ; size = most + most/2 - size {
			select {
			case <-stop:
				return
			default:
			}
			if err := dev.Resize(size); err != nil {
				t.Error(err)
			}
		}
	})
	answers := map[byte]int{}
	for round := range rounds {
		var heads [queues]uint16
		for i := range queues {
			// The last page, or the last of the smaller disk.
			sector := uint64(most/sectorSize - 8)
			if (round+i)%2 == 0 {
				sector = most/2/sectorSize - 8
			}
			heads[i] = d.Queue(i).Submit([][]byte{header(typeIn, sector)}, 4096, statusSize)
			d.Queue(i).Kick()
		}
		for i, head := range heads {
			d.Queue(i).Wait(head)
			answers[d.Queue(i).Writable(head)[4096]]++
		}
	}
	close(stop)
	resizer.Wait()
	if n := b.outside.Load(); n != 0 {
		t.Errorf("%d requests beyond the end", n)
	}
	if n := b.atResize.Load(); n != 0 {
		t.Errorf("%d requests in flight while the size changed", n)
	}
	if answers[statusOK]+answers[statusIOError] != rounds*queues || answers[statusOK] < rounds*queues/2 {
		t.Errorf("answers %v of %d requests", answers, rounds*queues)
	}
	if b.resizes.Load() < 2 {
		t.Errorf("%d resizes", b.resizes.Load())
	}
}
