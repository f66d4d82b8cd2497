package names_test

import (
	"iter"
	"math/rand/v2"
	"testing"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

// benchSize is far more than a cache holds, in bytes.
const benchSize = 512 << 20

// cpuSeconds returns the time that all cores gave this process.
func cpuSeconds(b *testing.B) float64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

// benchMemory fills memory with random bytes, no two pages alike.
func benchMemory(b *testing.B, huge memory.HugePages) (*memory.Space, []byte) {
	b.Helper()
	s, err := memory.New(memory.Config{Size: benchSize, HugePages: huge})
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { s.Close() })
	mem, err := s.Writable(0, benchSize)
	if err != nil {
		b.Fatal(err)
	}
	rand.NewChaCha8([32]byte{3}).Read(mem)
	return s, mem
}

// pageFilter is the index of a layer that equals memory page for page: a bit
// for each of 2^27 hashes, digests by block, and blocks by digest.
type pageFilter struct {
	bits    []uint64
	digests [][16]byte
	blocks  map[[16]byte]uint64
}

func filterOf(content []byte) *pageFilter {
	x := &pageFilter{bits: make([]uint64, 1<<21), blocks: map[[16]byte]uint64{}}
	for n := range uint64(len(content) / page) {
		b := content[n*page:][:page]
		h, d := xxh3.Hash(b)>>37, digestOf(b)
		x.bits[h/64] |= 1 << (h % 64)
		x.digests = append(x.digests, d)
		x.blocks[d] = n
	}
	return x
}

func (x *pageFilter) MayHold(h uint64) bool            { return x.bits[h>>43]>>(h>>37%64)&1 != 0 }
func (x *pageFilter) Digest(n uint64) ([16]byte, bool) { return x.digests[n], true }
func (x *pageFilter) Blocks(d [16]byte) iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		if n, ok := x.blocks[d]; ok {
			yield(n)
		}
	}
}

// benchPass runs a pass on one core. Besides the rate it reports what a core
// does whatever else runs on the machine.
func benchPass(b *testing.B, p names.Pass, check func(names.Summary) uint64) {
	b.Helper()
	p.Workers = 1
	b.SetBytes(benchSize)
	var m *names.Map
	before := cpuSeconds(b)
	for b.Loop() {
		m = mustRun(b, p)
	}
	b.ReportMetric(float64(b.N)*benchSize/(1<<30)/(cpuSeconds(b)-before), "GiB/cpu-s")
	if got := check(m.Summary()); got != benchSize {
		b.Errorf("%d bytes of %d: %+v", got, benchSize, m.Summary())
	}
}

// BenchmarkPass: each case is decided by one step.
func BenchmarkPass(b *testing.B) {
	s, mem := benchMemory(b, memory.HugePagesTHP)
	other := random(rand.New(rand.NewPCG(1, 1)), benchSize/8)
	absent := layerOf("absent", other, true, filterOf(other))
	equal := layerOf("equal", mem, true, filterOf(mem))
	plain := layerOf("plain", mem, false, nil)
	hints, proven := make(flat, benchSize/page), make(flat, benchSize/page)
	for i := range hints {
		hints[i] = names.OfBlock(0, uint64(i))
		proven[i] = hints[i].AsProven()
	}
	layer0 := func(s names.Summary) uint64 { return s.Layers[0] }
	unique := func(s names.Summary) uint64 { return s.Unique }
	b.Run("proven", func(b *testing.B) {
		benchPass(b, names.Pass{Space: s, Table: proven, Layers: []names.Layer{equal}}, layer0)
	})
	b.Run("filter", func(b *testing.B) {
		benchPass(b, names.Pass{Space: s, Layers: []names.Layer{absent}}, unique)
	})
	b.Run("blake3", func(b *testing.B) {
		benchPass(b, names.Pass{Space: s, Layers: []names.Layer{equal}}, layer0)
	})
	b.Run("recorded", func(b *testing.B) {
		benchPass(b, names.Pass{Space: s, Table: hints, Layers: []names.Layer{equal}}, layer0)
	})
	b.Run("compared", func(b *testing.B) {
		benchPass(b, names.Pass{Space: s, Table: hints, Layers: []names.Layer{plain}}, layer0)
	})
	b.Run("nothing known", func(b *testing.B) { benchPass(b, names.Pass{Space: s}, unique) })
}

// BenchmarkPassSmall is a proven memory of small pages.
func BenchmarkPassSmall(b *testing.B) {
	s, mem := benchMemory(b, memory.HugePagesOff)
	proven := make(flat, benchSize/page)
	for i := range proven {
		proven[i] = names.OfBlock(0, uint64(i)).AsProven()
	}
	benchPass(b, names.Pass{Space: s, Table: proven, Layers: []names.Layer{layerOf("", mem, true, nil)}}, func(s names.Summary) uint64 { return s.Layers[0] })
}

// flat is a table of a memory in one region.
type flat []names.Name

func (f flat) Load(dst []names.Name, gfn memory.GFN) { copy(dst, f[gfn:]) }

// BenchmarkPassZeros is a memory of zeros, all of it populated.
func BenchmarkPassZeros(b *testing.B) {
	s, mem := benchMemory(b, memory.HugePagesTHP)
	clear(mem)
	benchPass(b, names.Pass{Space: s}, func(s names.Summary) uint64 { return s.Zero })
}

// BenchmarkPassDuplicates: every page is there twice, half of memory apart.
func BenchmarkPassDuplicates(b *testing.B) {
	s, mem := benchMemory(b, memory.HugePagesTHP)
	copy(mem[benchSize/2:], mem)
	benchPass(b, names.Pass{Space: s}, func(s names.Summary) uint64 { return s.Duplicate + s.Unique })
}

// BenchmarkPassCollisions is a memory of pages that all have one XXH3.
func BenchmarkPassCollisions(b *testing.B) {
	s, mem := benchMemory(b, memory.HugePagesTHP)
	for i := range benchSize / page {
		collide(mem[i*page:][:page], uint32(i), 0)
	}
	benchPass(b, names.Pass{Space: s}, func(s names.Summary) uint64 { return s.Unique })
}

// BenchmarkRuns walks a map whose runs are of 16 pages.
func BenchmarkRuns(b *testing.B) {
	s, _ := benchMemory(b, memory.HugePagesTHP)
	table := make(flat, benchSize/page)
	for i := range table {
		table[i] = names.OfBlock(0, uint64(i+i/16)).AsProven()
	}
	m := mustRun(b, names.Pass{Space: s, Table: table, Layers: []names.Layer{{Size: 1 << 40}}, Steps: names.StepProven})
	b.SetBytes(benchSize)
	for b.Loop() {
		n := 0
		for range m.Runs() {
			n++
		}
		if n != benchSize/page/16 {
			b.Fatalf("%d runs", n)
		}
	}
}
