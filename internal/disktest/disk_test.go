package disktest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/disk"
	"ditto.vm/memory"
)

const allFeatures = ^uint64(0)

// Request types and sizes (virtio 1.2 5.2.6).
const (
	typeIn          = 0
	typeOut         = 1
	typeFlush       = 4
	typeWriteZeroes = 13
	headerSize      = 16
)

// newDisk makes a raw disk of n bytes and a block device over it.
func newDisk(tb testing.TB, n int64, o disk.Options, queues int) (*blk.Device, string) {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk.raw")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, n)); err != nil {
		tb.Fatal(err)
	}
	image, err := disk.Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	device, err := blk.New(blk.Config{
		Size: image.Size(), BlockSize: image.BlockSize(), Queues: queues,
		ReadOnly:     o.ReadOnly,
		Writethrough: o.Cache == disk.CacheWritethrough,
		NewIOQueue:   func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(device.Close(), image.Close()); err != nil {
			tb.Error(err)
		}
	})
	return device, path
}

func header(kind uint32, sector uint64) []byte {
	h := make([]byte, headerSize)
	binary.LittleEndian.PutUint32(h, kind)
	binary.LittleEndian.PutUint64(h[8:], sector)
	return h
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New: func(tb testing.TB) virtio.Device {
			d, _ := newDisk(tb, 1<<20, disk.Options{}, 2)
			return d
		},
		Drained: []int{0, 1},
		Chain: func(d *virtiotest.Driver, _ int) []virtiotest.Segment {
			return []virtiotest.Segment{
				{GPA: d.Alloc(headerSize, 16), Len: headerSize},
				{GPA: d.Alloc(4096, 4096), Len: 4096, Write: true},
				{GPA: d.Alloc(1, 1), Len: 1, Write: true},
			}
		},
	})
}

// TestMetamorphic sends random requests in every cache mode, many in flight,
// with pauses, and compares the file with a model in the end.
func TestMetamorphic(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone, disk.CacheWritethrough} {
		t.Run(cache.String(), func(t *testing.T) {
			const size, lanes = 4 << 20, 16
			device, path := newDisk(t, size, disk.Options{Cache: cache}, 2)
			d := virtiotest.NewDriver(t, device)
			d.Start(allFeatures, 128)
			rng := rand.New(rand.NewSource(int64(cache)))
			model := make([]byte, size)
			for range 30 {
				round(t, d, rng, model, lanes)
			}
			d.Reset()
			got, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, model) {
				t.Error("file and model differ")
			}
		})
	}
}

// round keeps one request a lane in flight; lanes do not overlap.
func round(t *testing.T, d *virtiotest.Driver, rng *rand.Rand, model []byte, lanes int) {
	t.Helper()
	type flight struct {
		q    *virtiotest.Queue
		head uint16
		want []byte // for a read
	}
	var flights []flight
	lane := len(model) / lanes
	for i := range lanes {
		q := d.Queue(rng.Intn(d.Queues()))
		at := i*lane + rng.Intn(lane/1024)*512
		n := (rng.Intn(min(lane-at%lane, 64<<10)/512) + 1) * 512
		sector := uint64(at / 512)
		f := flight{q: q}
		switch rng.Intn(5) {
		case 0, 1:
			data := make([]byte, n)
			rng.Read(data)
			copy(model[at:], data)
			cut := rng.Intn(n-1) + 1
			f.head = q.Submit([][]byte{header(typeOut, sector), data[:cut], data[cut:]}, 1)
		case 2:
			segment := make([]byte, 16)
			binary.LittleEndian.PutUint64(segment, sector)
			binary.LittleEndian.PutUint32(segment[8:], uint32(n/512))
			binary.LittleEndian.PutUint32(segment[12:], uint32(rng.Intn(2)))
			clear(model[at : at+n])
			f.head = q.Submit([][]byte{header(typeWriteZeroes, 0), segment}, 1)
		case 3:
			f.head = q.Submit([][]byte{header(typeFlush, 0)}, 1)
		default:
			f.want = bytes.Clone(model[at : at+n])
			cut := rng.Intn(n-1) + 1
			f.head = q.Submit([][]byte{header(typeIn, sector)}, cut, n-cut, 1)
		}
		flights = append(flights, f)
		if rng.Intn(3) == 0 {
			q.Kick()
		}
	}
	for i := range d.Queues() {
		d.Queue(i).Kick()
	}
	if rng.Intn(4) == 0 {
		d.Function.Pause()
		if err := d.Function.Resume(); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range flights {
		f.q.Wait(f.head)
		answer := f.q.Writable(f.head)
		if status := answer[len(answer)-1]; status != 0 {
			t.Fatalf("status %d", status)
		}
		if f.want != nil && !bytes.Equal(answer[:len(answer)-1], f.want) {
			t.Fatal("read something else than was written")
		}
	}
}

// BenchmarkRandom is fio's random read or write of 4 KiB with 32 in flight, as
// far as the VMM sees it: the driver's own work is part of the figure.
func BenchmarkRandom(b *testing.B) {
	for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone} {
		for _, kind := range []uint32{typeIn, typeOut} {
			b.Run(fmt.Sprintf("%s/%s", cache, map[uint32]string{typeIn: "read", typeOut: "write"}[kind]), func(b *testing.B) {
				benchmarkRandom(b, cache, kind)
			})
		}
	}
}

func benchmarkRandom(b *testing.B, cache disk.Cache, kind uint32) {
	const size, block, depth = 256 << 20, 4096, 32
	device, path := newDisk(b, size, disk.Options{Cache: cache}, 1)
	fill(b, path, size)
	d := virtiotest.NewDriver(b, device)
	d.Start(allFeatures, 128)
	q := d.Queue(0)
	rng := rand.New(rand.NewSource(1))
	var heads [depth]memory.GPA
	var requests [depth][]virtiotest.Segment
	for i := range depth {
		heads[i] = d.Alloc(headerSize, 16)
		requests[i] = []virtiotest.Segment{
			{GPA: heads[i], Len: headerSize},
			{GPA: d.Alloc(block, block), Len: block, Write: kind == typeIn},
			{GPA: d.Alloc(1, 1), Len: 1, Write: true},
		}
	}
	owner := map[uint16]int{}
	submit := func(i int) {
		if err := d.Machine.Memory.WriteAt(header(kind, uint64(rng.Intn(size/block)*block/512)), heads[i]); err != nil {
			b.Fatal(err)
		}
		owner[q.Add(false, requests[i]...)] = i
	}
	for i := range depth {
		submit(i)
	}
	q.Kick()
	b.SetBytes(block)
	b.ReportAllocs()
	for b.Loop() {
		head := q.WaitAny()
		i := owner[head]
		delete(owner, head)
		submit(i)
		if q.Drained() {
			q.Kick()
		}
	}
	q.Kick()
	for range depth {
		q.WaitAny()
	}
	b.ReportMetric(float64(device.Stats().Reads+device.Stats().Writes)/float64(device.Stats().Rounds), "requests/round")
}

// fill writes the file once, so that neither holes nor allocation are
// measured.
func fill(b *testing.B, path string, size int64) {
	b.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		b.Fatal(err)
	}
	chunk := bytes.Repeat([]byte{0x5A}, 1<<20)
	for at := int64(0); at < size; at += int64(len(chunk)) {
		if _, err := f.WriteAt(chunk, at); err != nil {
			b.Fatal(err)
		}
	}
	if err := errors.Join(f.Sync(), f.Close()); err != nil {
		b.Fatal(err)
	}
}
