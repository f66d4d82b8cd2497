package index

import (
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/zeebo/xxh3"
	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

// benchLayer makes a file of random bytes, in the page cache.
func benchLayer(b *testing.B, size int) (path string, content []byte) {
	b.Helper()
	content = make([]byte, size)
	_, _ = rand.NewChaCha8([32]byte{5}).Read(content)
	path = filepath.Join(b.TempDir(), "disk")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		b.Fatal(err)
	}
	return path, content
}

// BenchmarkBuild reads a layer from the page cache, hashes, sorts and writes.
func BenchmarkBuild(b *testing.B) {
	const size = 512 << 20
	path, _ := benchLayer(b, size)
	src, err := layer.OpenFile(path)
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	for _, bench := range []struct {
		name    string
		workers int
	}{{"one core", 1}, {"all cores", 0}} {
		b.Run(bench.name, func(b *testing.B) {
			b.SetBytes(size)
			index := filepath.Join(b.TempDir(), "x")
			before := cpuSeconds(b)
			for b.Loop() {
				mustBuild(b, src, index, Options{Workers: bench.workers})
			}
			// What a core does, whatever else runs on the machine.
			b.ReportMetric(float64(b.N)*size/(1<<30)/(cpuSeconds(b)-before), "GiB/cpu-s")
			info, err := os.Stat(index)
			if err != nil {
				b.Fatal(err)
			}
			b.ReportMetric(float64(info.Size())/float64(size)*100, "%size")
		})
	}
}

// cpuSeconds returns the time that all cores gave this process.
func cpuSeconds(b *testing.B) float64 {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return float64(u.Utime.Nano()+u.Stime.Nano()) / 1e9
}

func benchIndex(b *testing.B) (*Index, []byte, string) {
	b.Helper()
	path, content := benchLayer(b, 256<<20)
	src, err := layer.OpenFile(path)
	if err != nil {
		b.Fatal(err)
	}
	defer src.Close()
	index := filepath.Join(b.TempDir(), "x")
	mustBuild(b, src, index, Options{})
	return mustOpen(b, index), content, index
}

func BenchmarkOpen(b *testing.B) {
	_, content, path := benchIndex(b)
	b.SetBytes(int64(len(content)))
	for b.Loop() {
		x, err := Open(path)
		if err != nil {
			b.Fatal(err)
		}
		_ = x.Close()
	}
}

// BenchmarkLookup: bytes are those of the pages that are looked up.
func BenchmarkLookup(b *testing.B) {
	x, content, _ := benchIndex(b)
	blocks := len(content) / layer.BlockSize
	digests := make([]layer.Digest, blocks)
	for i := range digests {
		digests[i], _ = x.Digest(uint64(i))
	}
	absent := make([]layer.Digest, 1<<16)
	rng := rand.NewChaCha8([32]byte{6})
	for i := range absent {
		_, _ = rng.Read(absent[i][:])
	}
	i := 0
	b.Run("present", func(b *testing.B) {
		b.SetBytes(layer.BlockSize)
		for b.Loop() {
			if _, ok := x.Block(digests[i*7919%blocks]); !ok {
				b.Fatal("not found")
			}
			i++
		}
	})
	b.Run("absent", func(b *testing.B) {
		b.SetBytes(layer.BlockSize)
		for b.Loop() {
			if _, ok := x.Block(absent[i%len(absent)]); ok {
				b.Fatal("found")
			}
			i++
		}
	})
	page := func() []byte { i++; return content[i*7919%blocks*layer.BlockSize:][:layer.BlockSize] }
	b.Run("page by BLAKE3", func(b *testing.B) {
		b.SetBytes(layer.BlockSize)
		for b.Loop() {
			if _, ok := x.Block(layer.Sum(page())); !ok {
				b.Fatal("not found")
			}
		}
	})
	b.Run("page by filter", func(b *testing.B) {
		b.SetBytes(layer.BlockSize)
		for b.Loop() {
			if !x.MayHold(xxh3.Hash(page())) {
				b.Fatal("denied")
			}
		}
	})
}
