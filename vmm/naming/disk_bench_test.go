package naming

import (
	"encoding/binary"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/chain"
	"ditto.vm/memory"
)

// The work of BenchmarkDisk: like fio with a depth of 32 on a disk that is in the
// host's page cache, without a guest's kernel between.
const (
	benchDepth  = 32
	benchDisk   = 256 << 20
	benchMemory = 256 << 20
	benchRounds = 9
	buffersAt   = 64 << 20
)

// benchRig is a disk, its device, and a driver.
type benchRig struct {
	queue  *virtiotest.Queue
	mem    *memory.Space
	random *rand.Rand
}

// newBenchRig makes one, whose memory is named by a prover at work or not at all.
func newBenchRig(b *testing.B, named bool) *benchRig {
	mem, err := memory.New(memory.Config{Size: benchMemory})
	must(b, err)
	b.Cleanup(func() { must(b, mem.Close()) })
	path := filepath.Join(b.TempDir(), "disk")
	must(b, os.WriteFile(path, nil, 0o600))
	must(b, os.Truncate(path, benchDisk))
	image, err := chain.Open(path, chain.Options{Format: chain.Raw})
	must(b, err)
	b.Cleanup(func() { must(b, image.Close()) })
	config := blk.Config{
		Size: image.Size(), BlockSize: image.BlockSize(), Queues: 1,
		NewIOQueue: func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
	}
	if named {
		tracker, _, err := memory.OpenTracker(mem, memory.TrackerAuto, memory.TrackerHost{})
		must(b, err)
		b.Cleanup(func() { must(b, tracker.Close()) })
		frames, err := memory.NewFrames(mem, tracker)
		must(b, err)
		b.Cleanup(func() { must(b, frames.Close()) })
		n := New(mem, tracker, frames, slog.New(slog.DiscardHandler), Options{})
		b.Cleanup(func() { mem.SetObserver(nil); must(b, n.Close()) })
		config.Observer, err = n.AddDisk(image)
		must(b, err)
		n.Start()
	}
	dev, err := blk.New(config)
	must(b, err)
	b.Cleanup(func() { must(b, dev.Close()) })
	d := virtiotest.NewMachineOn(b, mem).NewDriver(b, dev)
	d.Start(^uint64(0), 256)
	r := &benchRig{queue: d.Queue(0), mem: mem, random: rand.New(rand.NewPCG(1, 2))}
	r.run(b, "write", 128<<10, benchDisk/(128<<10)) // so that nothing is a hole
	return r
}

// run does n requests, benchDepth at a time, and returns how long they took.
func (r *benchRig) run(b *testing.B, kind string, size, n int) time.Duration {
	const sector = 512
	pages := make([]byte, 32)
	began := time.Now()
	for sent, done := 0, 0; done < n; {
		for ; sent < n && sent-done < benchDepth; sent++ {
			at := int64(sent) * int64(size)
			if size == memory.PageSize {
				at = r.random.Int64N(benchDisk/int64(size)) * int64(size)
			}
			clear(pages)
			if kind == "write" {
				pages[0] = 1
			}
			binary.LittleEndian.PutUint64(pages[8:], uint64(at%benchDisk/sector))
			slot := memory.GPA(1<<20 + sent%(2*benchDepth)*64) // header and status
			must(b, r.mem.WriteAt(pages[:16], slot))
			buffer := memory.GPA(buffersAt + r.random.Int64N((benchMemory-buffersAt)/int64(size))*int64(size))
			r.queue.Add(false,
				virtiotest.Segment{GPA: slot, Len: 16},
				virtiotest.Segment{GPA: buffer, Len: size, Write: kind == "read"},
				virtiotest.Segment{GPA: slot + 16, Len: 1, Write: true})
		}
		r.queue.Kick()
		for r.queue.WaitAny(); ; r.queue.WaitAny() {
			if done++; r.queue.Drained() || done == n {
				break
			}
		}
	}
	return time.Since(began)
}

// BenchmarkDisk compares a disk whose pages are named with one without names, in
// turns, and reports the median of the ratios of their speeds.
func BenchmarkDisk(b *testing.B) {
	named, plain := newBenchRig(b, true), newBenchRig(b, false)
	for _, c := range []struct {
		name, kind string
		size, n    int
	}{
		{"seq-read", "read", 128 << 10, 4096}, {"rand-read", "read", 4096, 60000}, {"rand-write", "write", 4096, 60000},
	} {
		b.Run(c.name, func(b *testing.B) {
			for range b.N {
				var ratios, speeds []float64
				for i := range benchRounds {
					first, second := named, plain
					if i%2 == 1 {
						first, second = plain, named
					}
					x, y := first.run(b, c.kind, c.size, c.n), second.run(b, c.kind, c.size, c.n)
					if i%2 == 1 {
						x, y = y, x
					}
					ratios = append(ratios, y.Seconds()/x.Seconds())
					speeds = append(speeds, float64(c.n)/x.Seconds())
				}
				slices.Sort(ratios)
				slices.Sort(speeds)
				b.ReportMetric(ratios[benchRounds/2], "x-of-plain")
				b.ReportMetric(speeds[benchRounds/2], "IOPS")
				b.Logf("ratios %.3f", ratios)
			}
		})
	}
}
