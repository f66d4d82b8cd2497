package blk

import (
	"bytes"
	"encoding/binary"
	"slices"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New: func(tb testing.TB) virtio.Device {
			return newDevice(tb, newFakeDisk(1<<20), func(c *Config) { c.Queues = 3 })
		},
		Drained: []int{0, 1, 2},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			tb.Helper()
			want := bytes.Repeat([]byte("block"), 1024)[:4096]
			for i := range d.Queues() {
				q := d.Queue(i)
				if _, status := do(tb, q, [][]byte{header(typeOut, 8), want}, 0); status != statusOK {
					tb.Fatalf("write: status %d", status)
				}
				if got, status := do(tb, q, [][]byte{header(typeIn, 8)}, 4096); status != statusOK || !bytes.Equal(got, want) {
					tb.Fatalf("read: status %d, %d bytes", status, len(got))
				}
			}
		},
		Chain: func(d *virtiotest.Driver, _ int) []virtiotest.Segment {
			head := d.Alloc(headerSize, 16) // zeros: a read of sector 0
			return []virtiotest.Segment{
				{GPA: head, Len: headerSize},
				{GPA: d.Alloc(512, 512), Len: 512, Write: true},
				{GPA: d.Alloc(1, 1), Len: 1, Write: true},
			}
		},
	})
}

func TestRequests(t *testing.T) {
	const size = 1 << 20
	data := bytes.Repeat([]byte{0xA5}, 1024)
	for _, c := range []struct {
		name   string
		out    [][]byte
		in     int
		status byte
	}{
		{"read the last sector", [][]byte{header(typeIn, size/512-1)}, 512, statusOK},
		{"read past the end", [][]byte{header(typeIn, size/512)}, 512, statusIOError},
		{"read across the end", [][]byte{header(typeIn, size/512-1)}, 1024, statusIOError},
		{"read at the last sector number", [][]byte{header(typeIn, ^uint64(0))}, 512, statusIOError},
		{"read where bytes wrap", [][]byte{header(typeIn, 1<<55)}, 512, statusIOError},
		{"read part of a sector", [][]byte{header(typeIn, 0)}, 100, statusIOError},
		{"read nothing", [][]byte{header(typeIn, 0)}, 0, statusOK},
		{"write", [][]byte{header(typeOut, 0), data}, 0, statusOK},
		{"write in odd pieces", [][]byte{header(typeOut, 0)[:7], header(typeOut, 0)[7:], data[:100], data[100:]}, 0, statusOK},
		{"write with the header", [][]byte{append(header(typeOut, 0), data...)}, 0, statusOK},
		{"write past the end", [][]byte{header(typeOut, size/512), data}, 0, statusIOError},
		{"write part of a sector", [][]byte{header(typeOut, 0), data[:511]}, 0, statusIOError},
		{"flush", [][]byte{header(typeFlush, 0)}, 0, statusOK},
		{"discard", [][]byte{header(typeDiscard, 0), segment(8, 8, 0)}, 0, statusOK},
		{"discard to the end", [][]byte{header(typeDiscard, 0), segment(0, size/512, 0)}, 0, statusOK},
		{"discard past the end", [][]byte{header(typeDiscard, 0), segment(1, size/512, 0)}, 0, statusIOError},
		{"discard wrapping", [][]byte{header(typeDiscard, 0), segment(^uint64(0), 2, 0)}, 0, statusIOError},
		{"discard nothing", [][]byte{header(typeDiscard, 0), segment(0, 0, 0)}, 0, statusIOError},
		{"discard too much", [][]byte{header(typeDiscard, 0), segment(0, maxEraseSectors+1, 0)}, 0, statusIOError},
		{"discard with unmap", [][]byte{header(typeDiscard, 0), segment(0, 8, unmapFlag)}, 0, statusUnsupported},
		{"discard two segments", [][]byte{header(typeDiscard, 0), segment(0, 8, 0), segment(8, 8, 0)}, 0, statusIOError},
		{"discard no segment", [][]byte{header(typeDiscard, 0)}, 0, statusIOError},
		{"zero", [][]byte{header(typeWriteZeroes, 0), segment(8, 8, 0)}, 0, statusOK},
		{"zero with unmap", [][]byte{header(typeWriteZeroes, 0), segment(8, 8, unmapFlag)}, 0, statusOK},
		{"zero with unknown flags", [][]byte{header(typeWriteZeroes, 0), segment(8, 8, 2)}, 0, statusUnsupported},
		{"lifetime", [][]byte{header(10, 0)}, 8, statusUnsupported},
		{"unknown", [][]byte{header(0xFFFFFFFF, 0)}, 512, statusUnsupported},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := start(t, newDevice(t, newFakeDisk(size), nil))
			if _, status := do(t, d.Queue(0), c.out, c.in); status != c.status {
				t.Errorf("status %d, want %d", status, c.status)
			}
			if d.Status()&virtio.StatusNeedsReset != 0 {
				t.Error("device needs a reset")
			}
		})
	}
}

// TestNoRoomForStatus sends requests that cannot be answered.
func TestNoRoomForStatus(t *testing.T) {
	for name, out := range map[string][]byte{
		"no writable byte": header(typeFlush, 0),
		"short header":     header(typeFlush, 0)[:15],
	} {
		t.Run(name, func(t *testing.T) {
			dev := newDevice(t, newFakeDisk(1<<20), nil)
			d := start(t, dev)
			q := d.Queue(0)
			q.Submit([][]byte{out})
			q.Kick()
			for d.Status()&virtio.StatusNeedsReset == 0 {
				d.Function.Pause()
				if err := d.Function.Resume(); err != nil {
					t.Fatal(err)
				}
			}
			if n := d.Function.NeedsResets(); n != 1 {
				t.Errorf("%d resets are needed, want 1", n)
			}
		})
	}
}

func TestIdentify(t *testing.T) {
	for serial, want := range map[string]string{
		"ditto-0":              "ditto-0" + string(make([]byte, 13)),
		"12345678901234567890": "12345678901234567890",
	} {
		d := start(t, newDevice(t, newFakeDisk(1<<20), func(c *Config) { c.Serial = serial }))
		got, status := do(t, d.Queue(0), [][]byte{header(typeGetID, 0)}, serialSize)
		if status != statusOK || string(got) != want {
			t.Errorf("serial number %q, status %d, want %q", got, status, want)
		}
	}
}

func TestReadOnly(t *testing.T) {
	disk := newFakeDisk(1 << 20)
	d := start(t, newDevice(t, disk, func(c *Config) { c.ReadOnly = true }))
	if d.Offered()&FeatureReadOnly == 0 || d.Offered()&(FeatureDiscard|FeatureWriteZeroes) != 0 {
		t.Errorf("features %#x", d.Offered())
	}
	for kind, out := range map[uint32][]byte{
		typeOut: make([]byte, 512), typeDiscard: segment(0, 8, 0), typeWriteZeroes: segment(0, 8, 0),
	} {
		if _, status := do(t, d.Queue(0), [][]byte{header(kind, 0), out}, 0); status == statusOK {
			t.Errorf("request %d succeeds on a read-only disk", kind)
		}
	}
	if events := disk.seen(); len(events) != 0 {
		t.Errorf("the disk saw %v", events)
	}
	if _, status := do(t, d.Queue(0), [][]byte{header(typeIn, 0)}, 512); status != statusOK {
		t.Errorf("read: status %d", status)
	}
}

// TestLogicalBlocks refuses requests that are not multiples of the block size.
func TestLogicalBlocks(t *testing.T) {
	d := start(t, newDevice(t, newFakeDisk(1<<20), func(c *Config) { c.BlockSize = 4096 }))
	for _, c := range []struct {
		sector uint64
		n      int
		status byte
	}{{0, 4096, statusOK}, {8, 4096, statusOK}, {1, 4096, statusIOError}, {0, 512, statusIOError}} {
		if _, status := do(t, d.Queue(0), [][]byte{header(typeIn, c.sector)}, c.n); status != c.status {
			t.Errorf("read of %d bytes at sector %d: status %d, want %d", c.n, c.sector, status, c.status)
		}
	}
	if got := binary.LittleEndian.Uint32(d.DeviceConfig(configBlockSize, 4)); got != 4096 {
		t.Errorf("block size %d", got)
	}
}

// TestWriteCache checks what makes a write stable: the cache mode, what the
// driver negotiated, and the driver's switch.
func TestWriteCache(t *testing.T) {
	for _, c := range []struct {
		name         string
		writethrough bool
		features     uint64
		toggle       []byte // written to the writeback field, if not nil
		want         []string
	}{
		{"write-back", false, allFeatures, nil, []string{"write", "discard", "zero"}},
		{"write-through", true, allFeatures, nil, []string{"write stable", "discard", "flush", "zero", "flush"}},
		{"switched off", false, allFeatures, []byte{0}, []string{"write stable", "discard", "flush", "zero", "flush"}},
		{"switched on", true, allFeatures, []byte{1}, []string{"write", "discard", "zero"}},
		{"driver without flush", false, allFeatures &^ FeatureFlush, nil, []string{"write stable", "discard", "flush", "zero", "flush"}},
		{"driver without switch", false, allFeatures &^ FeatureConfigWCE, nil, []string{"write", "discard", "zero"}},
		{"write-through without switch", true, allFeatures &^ FeatureConfigWCE, nil, []string{"write stable", "discard", "flush", "zero", "flush"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newFakeDisk(1 << 20)
			dev := newDevice(t, disk, func(config *Config) { config.Writethrough = c.writethrough })
			d := virtiotest.NewDriver(t, dev)
			d.Start(c.features, 64)
			if c.toggle != nil {
				d.Write(d.Config+configWriteback, 1, uint64(c.toggle[0]))
			}
			q := d.Queue(0)
			do(t, q, [][]byte{header(typeOut, 0), make([]byte, 512)}, 0)
			do(t, q, [][]byte{header(typeDiscard, 0), segment(0, 8, 0)}, 0)
			do(t, q, [][]byte{header(typeWriteZeroes, 0), segment(0, 8, 0)}, 0)
			if got := disk.seen(); !slices.Equal(got, c.want) {
				t.Errorf("the disk saw %v, want %v", got, c.want)
			}
			d.Reset()
			if got := d.DeviceConfig(configWriteback, 1)[0] == 1; got == c.writethrough {
				t.Errorf("after a reset the cache is on: %v", got)
			}
		})
	}
}

// TestFlushAfterWrites checks that a flush begins after every write that the
// driver was told of.
func TestFlushAfterWrites(t *testing.T) {
	disk := newFakeDisk(1 << 20)
	d := start(t, newDevice(t, disk, nil))
	q := d.Queue(0)
	for round := range 20 {
		var heads []uint16
		for i := range 8 {
			heads = append(heads, q.Submit([][]byte{header(typeOut, uint64(i)), make([]byte, 512)}, 1))
		}
		q.Kick()
		for _, h := range heads {
			q.Wait(h)
		}
		do(t, q, [][]byte{header(typeFlush, 0)}, 0)
		if got := disk.seen(); got[len(got)-1] != "flush" || len(got) != 9*(round+1) {
			t.Fatalf("round %d: the disk saw %v", round, got)
		}
	}
}

// TestDiskFails answers failures of the disk with a status and goes on.
func TestDiskFails(t *testing.T) {
	disk := newFakeDisk(1 << 20)
	dev := newDevice(t, disk, nil)
	d := start(t, dev)
	disk.setFailure(errDisk)
	for _, out := range [][][]byte{
		{header(typeIn, 0)}, {header(typeOut, 0), make([]byte, 512)}, {header(typeFlush, 0)},
		{header(typeDiscard, 0), segment(0, 8, 0)},
	} {
		in := 0
		if len(out) == 1 && out[0][0] == typeIn {
			in = 512
		}
		if _, status := do(t, d.Queue(0), out, in); status != statusIOError {
			t.Errorf("request %d: status %d, want an I/O error", out[0][0], status)
		}
	}
	if got := dev.Stats().Errors; got != 4 {
		t.Errorf("%d errors counted, want 4", got)
	}
	disk.setFailure(nil)
	if _, status := do(t, d.Queue(0), [][]byte{header(typeIn, 0)}, 512); status != statusOK {
		t.Errorf("status %d after the disk recovered", status)
	}
}

// TestPauseWaits holds the disk back: a pause must not end before the request
// in flight is answered.
func TestPauseWaits(t *testing.T) {
	disk := newFakeDisk(1 << 20)
	disk.gate = make(chan struct{})
	dev := newDevice(t, disk, nil)
	d := start(t, dev)
	q := d.Queue(0)
	head := q.Submit([][]byte{header(typeIn, 0)}, 512, 1)
	q.Kick()
	paused := make(chan struct{})
	go func() {
		d.Function.Pause()
		close(paused)
	}()
	close(disk.gate)
	<-paused
	if q.Reap(); !q.Done(head) && len(disk.seen()) > 0 {
		t.Error("the pause ended before the request was given back")
	}
	if err := d.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	q.Wait(head)
}

func TestConfigSpace(t *testing.T) {
	d := start(t, newDevice(t, newFakeDisk(1<<20), func(c *Config) { c.Queues = 4; c.QueueSize = 256 }))
	config := d.DeviceConfig(0, configSize)
	le := binary.LittleEndian
	for _, c := range []struct {
		name string
		got  uint64
		want uint64
	}{
		{"capacity", le.Uint64(config[configCapacity:]), 1 << 20 / 512},
		{"seg_max", uint64(le.Uint32(config[configSegMax:])), 254},
		{"blk_size", uint64(le.Uint32(config[configBlockSize:])), 512},
		{"physical_block_exp", uint64(config[configPhysicalExp]), 3},
		{"writeback", uint64(config[configWriteback]), 1},
		{"num_queues", uint64(le.Uint16(config[configNumQueues:])), 4},
		{"max_discard_seg", uint64(le.Uint32(config[configDiscardSegs:])), 1},
		{"write_zeroes_may_unmap", uint64(config[configZeroUnmap]), 1},
	} {
		if c.got != c.want {
			t.Errorf("%s is %d, want %d", c.name, c.got, c.want)
		}
	}
	segments, size := uint64(le.Uint32(config[configSegMax:])), uint64(le.Uint32(config[configSizeMax:]))
	if total := segments*size + headerSize + statusSize; size%4096 != 0 || total > virtio.MaxChainBytes {
		t.Errorf("%d segments of %d bytes are more than a chain holds", segments, size)
	}
}

func TestBadConfig(t *testing.T) {
	for name, change := range map[string]func(*Config){
		"no size":         func(c *Config) { c.Size = 0 },
		"odd size":        func(c *Config) { c.Size = 1000 },
		"block size":      func(c *Config) { c.BlockSize = 1000 },
		"physical size":   func(c *Config) { c.PhysicalBlockSize = 256 },
		"too many queues": func(c *Config) { c.Queues = maxQueues + 1 },
		"queue size":      func(c *Config) { c.QueueSize = 100 },
		"serial":          func(c *Config) { c.Serial = "more than twenty bytes" },
		"no queue":        func(c *Config) { c.NewIOQueue = nil },
	} {
		c := Config{Size: 1 << 20, NewIOQueue: newFakeDisk(1 << 20).newQueue}
		change(&c)
		if d, err := New(c); err == nil {
			t.Errorf("%s: accepted", name)
			_ = d.Close()
		}
	}
}

func FuzzDevice(f *testing.F) {
	virtiotest.Fuzz(f, func(tb testing.TB) virtio.Device {
		return newDevice(tb, newFakeDisk(1<<20), func(c *Config) { c.Queues = 2 })
	})
}
