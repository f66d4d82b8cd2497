package index

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/zeebo/xxh3"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ditto.vm/images/layer"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// memSource is a layer in memory.
type memSource struct {
	content []byte
	stamp   layer.Stamp
	// onRead is called before each read; its error is the read's.
	onRead func(off int64) error
}

func newMemSource(content []byte) *memSource {
	return &memSource{content: content, stamp: layer.Stamp{Size: int64(len(content)), Mtime: 7, Inode: 9}}
}

func (m *memSource) Size() int64                 { return int64(len(m.content)) }
func (m *memSource) Stamp() (layer.Stamp, error) { return m.stamp, nil }

func (m *memSource) ReadAt(p []byte, off int64) (int, error) {
	if m.onRead != nil {
		if err := m.onRead(off); err != nil {
			return 0, err
		}
	}
	return bytes.NewReader(m.content).ReadAt(p, off)
}

// NextData knows holes of a chunk.
func (m *memSource) NextData(off int64) (start, end int64, err error) {
	for ; off < m.Size(); off = (off/layer.ChunkSize + 1) * layer.ChunkSize {
		end := min((off/layer.ChunkSize+1)*layer.ChunkSize, m.Size())
		if len(bytes.TrimLeft(m.content[off:end], "\x00")) > 0 {
			return off, end, nil
		}
	}
	return 0, 0, io.EOF
}

// sample makes a layer of nearly six chunks: random blocks, zero blocks, blocks
// that stand several times, a chunk of zeros and a tail that fills no block.
func sample() []byte {
	rng := rand.NewChaCha8([32]byte{1})
	r := rand.New(rng)
	content := make([]byte, 5*layer.ChunkSize+321*layer.BlockSize+77)
	for off := 0; off < len(content); off += layer.BlockSize {
		b := content[off:min(off+layer.BlockSize, len(content))]
		switch r.IntN(4) {
		case 0, 1:
			_, _ = rng.Read(b)
		case 2:
			b[5] = byte(r.IntN(20))
		}
	}
	clear(content[2*layer.ChunkSize : 3*layer.ChunkSize])
	return content
}

func mustBuild(t testing.TB, src Source, path string, opts Options) Built {
	t.Helper()
	built, err := Build(context.Background(), src, path, opts)
	if err != nil {
		t.Fatal(err)
	}
	return built
}

func mustOpen(t testing.TB, path string) *Index {
	t.Helper()
	x, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

// only checks that the folder holds the index and nothing else.
func only(t *testing.T, path string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(filepath.Dir(path))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !slices.Equal(got, want) {
		t.Errorf("the folder holds %v, want %v", got, want)
	}
}

// TestLookups compares every answer of an index with brute force.
func TestLookups(t *testing.T) {
	for name, content := range map[string][]byte{
		"sample": sample(), "empty": nil, "zeros": make([]byte, 3*layer.BlockSize), "tail only": []byte("x"),
		"one block": bytes.Repeat([]byte{1}, layer.BlockSize),
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "x.idx")
			src := newMemSource(content)
			built := mustBuild(t, src, path, Options{})
			only(t, path, "x.idx")
			x := mustOpen(t, path)
			compareWithContent(t, x, content)
			if built.LayerID != x.LayerID() || built.Entries != x.Entries() || x.LayerSize() != src.Size() || built.Resumed != 0 {
				t.Errorf("built %+v, index of %s with %d entries", built, x.LayerID(), x.Entries())
			}
			if err := x.Check(src, 100); err != nil {
				t.Error(err)
			}
		})
	}
}

func compareWithContent(t *testing.T, x *Index, content []byte) {
	t.Helper()
	where := map[layer.Digest][]uint64{}
	entries := uint64(0)
	for n := range len(content) / layer.BlockSize {
		b := content[n*layer.BlockSize:][:layer.BlockSize]
		d, ok := x.Digest(uint64(n))
		if layer.IsZero(b) {
			if ok {
				t.Errorf("zero block %d has digest %x", n, d)
			}
			continue
		}
		entries++
		if !ok || d != layer.Sum(b) {
			t.Errorf("block %d has digest %x %v, want %x", n, d, ok, layer.Sum(b))
		}
		if !x.MayHold(xxh3.Hash(b)) {
			t.Errorf("the filter denies block %d", n)
		}
		where[d] = append(where[d], uint64(n))
	}
	if x.Entries() != entries {
		t.Errorf("%d entries, want %d", x.Entries(), entries)
	}
	for d, blocks := range where {
		if got := slices.Collect(x.Blocks(d)); !slices.Equal(got, blocks) {
			t.Errorf("digest %x is at %v, want %v", d, got, blocks)
		}
		if first, ok := x.Block(d); !ok || first != blocks[0] {
			t.Errorf("digest %x is first at %d, want %d", d, first, blocks[0])
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	passed := 0
	const absent = 3000
	for range absent {
		var d layer.Digest
		for i := range d {
			d[i] = byte(rng.Uint32())
		}
		if block, ok := x.Block(d); ok {
			t.Errorf("a digest of no block is at %d", block)
		}
		if x.MayHold(rng.Uint64()) {
			passed++
		}
	}
	if passed > absent/50 {
		t.Errorf("%d of %d absent pages pass the filter", passed, absent)
	}
	for _, block := range []uint64{uint64(len(content) / layer.BlockSize), 1 << 40, ^uint64(0)} {
		if d, ok := x.Digest(block); ok {
			t.Errorf("block %d outside the layer has digest %x", block, d)
		}
	}
}

// TestIdentity: the identity is that of the package layer's definition, however
// many workers there are, and the file is the same byte for byte.
func TestIdentity(t *testing.T) {
	content := sample()
	h := layer.NewContentHasher(int64(len(content)))
	for first := 0; first < len(content)/layer.BlockSize; first += layer.ChunkBlocks {
		var digests [layer.ChunkBlocks]layer.Digest
		for i := first; i < min(first+layer.ChunkBlocks, len(content)/layer.BlockSize); i++ {
			if b := content[i*layer.BlockSize:][:layer.BlockSize]; !layer.IsZero(b) {
				digests[i-first] = layer.Sum(b)
			}
		}
		h.Chunk(int64(first/layer.ChunkBlocks), &digests)
	}
	want := h.ID(content[len(content)/layer.BlockSize*layer.BlockSize:])

	var first []byte
	for _, workers := range []int{1, 2, 7} {
		path := filepath.Join(t.TempDir(), "x")
		var done []int64
		built := mustBuild(t, newMemSource(content), path, Options{Workers: workers, Progress: func(d, size int64) {
			if size != int64(len(content)) {
				t.Errorf("progress of %d bytes", size)
			}
			done = append(done, d)
		}})
		if built.LayerID != want || built.Read != int64(len(content))-layer.ChunkSize {
			t.Errorf("%d workers: built %+v, want identity %s", workers, built, want)
		}
		if !slices.IsSorted(done) || len(done) < 5 || done[len(done)-1] != int64(len(content)) {
			t.Errorf("progress %v", done)
		}
		b, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if first == nil {
			first = b
		}
		if !bytes.Equal(b, first) {
			t.Errorf("%d workers make another file", workers)
		}
	}
}

// TestGolden pins version 1 of the format.
func TestGolden(t *testing.T) {
	content := make([]byte, 40*layer.BlockSize)
	for i := range 40 {
		content[i*layer.BlockSize] = byte(i % 30) // block 0 and 30 are zero, 1 to 9 stand twice
	}
	path := filepath.Join(t.TempDir(), "x")
	mustBuild(t, newMemSource(content), path, Options{})
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	const golden = "5120 bytes, 11fb80a6e46939ffcd6887fc086100fe"
	if got := fmt.Sprintf("%d bytes, %s", len(b), hexOf(xxh3.Hash128(b).Bytes())); got != golden {
		t.Errorf("%s, want %s: an index of version 1 must stay readable", got, golden)
	}
}

func hexOf(b [16]byte) string { return hex.EncodeToString(b[:]) }

// TestResume interrupts a build after each chunk, by the context and by a
// failing read.
func TestResume(t *testing.T) {
	content := sample()
	whole := filepath.Join(t.TempDir(), "x")
	mustBuild(t, newMemSource(content), whole, Options{})
	want, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	broken := errors.New("broken disk")
	for stop := int64(0); stop <= 5; stop++ {
		for _, byContext := range []bool{false, true} {
			path := filepath.Join(t.TempDir(), "x")
			ctx, cancel := context.WithCancel(t.Context())
			src := newMemSource(content)
			src.onRead = func(off int64) error {
				switch {
				case off < stop*layer.ChunkSize:
				case byContext:
					cancel()
				default:
					return broken
				}
				return nil
			}
			_, err := Build(ctx, src, path, Options{Workers: 1})
			cancel()
			if err == nil || byContext && !errors.Is(err, context.Canceled) || !byContext && !errors.Is(err, broken) {
				t.Fatalf("stopped at chunk %d: %v", stop, err)
			}
			only(t, path, "x.partial")
			lowest := int64(len(content))
			src.onRead = func(off int64) error { lowest = min(lowest, off); return nil }
			built := mustBuild(t, src, path, Options{Workers: 1})
			// Chunk 2 is zero and not in the journal; a cancelled build may
			// drop what was under way.
			done := map[int64]int64{0: 0, 1: 1, 2: 2, 3: 2, 4: 4, 5: 5}[stop] * layer.ChunkSize
			if built.Resumed > done || !byContext && built.Resumed < done || lowest < built.Resumed {
				t.Errorf("stopped at chunk %d: %d bytes resumed, then read from %d", stop, built.Resumed, lowest)
			}
			got, err := os.ReadFile(path)
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("stopped at chunk %d: another index than in one go (%v)", stop, err)
			}
			only(t, path, "x")
		}
	}
}

// TestDamagedJournal: whatever stands in a journal, the index is right.
func TestDamagedJournal(t *testing.T) {
	content := sample()
	dir := t.TempDir()
	whole := filepath.Join(dir, "whole")
	mustBuild(t, newMemSource(content), whole, Options{})
	want, err := os.ReadFile(whole)
	if err != nil {
		t.Fatal(err)
	}
	interrupted := filepath.Join(dir, "x")
	src := newMemSource(content)
	src.onRead = func(off int64) error {
		if off >= 4*layer.ChunkSize {
			return errors.New("stop")
		}
		return nil
	}
	if _, err := Build(t.Context(), src, interrupted, Options{Workers: 1}); err == nil {
		t.Fatal("not interrupted")
	}
	journal, err := os.ReadFile(interrupted + journalSuffix)
	if err != nil || len(journal) < 2*layer.ChunkBlocks*16 {
		t.Fatalf("journal of %d bytes, %v", len(journal), err)
	}
	rng := rand.New(rand.NewPCG(2, 2))
	for i := range 60 {
		damaged := bytes.Clone(journal)
		switch i % 3 {
		case 0:
			damaged = damaged[:rng.IntN(len(damaged))]
		case 1:
			damaged[rng.IntN(len(damaged))] ^= 1 << rng.IntN(8)
		case 2:
			damaged = append(damaged, damaged[journalHeaderSize:]...)
		}
		path := filepath.Join(dir, "y")
		if err := os.WriteFile(path+journalSuffix, damaged, 0o600); err != nil {
			t.Fatal(err)
		}
		mustBuild(t, newMemSource(content), path, Options{})
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("damage %d: another index (%v)", i, err)
		}
	}
	// The journal of another state of the layer is not used.
	path := filepath.Join(dir, "z")
	if err := os.WriteFile(path+journalSuffix, journal, 0o600); err != nil {
		t.Fatal(err)
	}
	other := newMemSource(bytes.Clone(content))
	other.content[0]++
	other.stamp.Mtime++
	if built := mustBuild(t, other, path, Options{}); built.Resumed != 0 {
		t.Errorf("%d bytes resumed from the journal of another layer", built.Resumed)
	}
	compareWithContent(t, mustOpen(t, path), other.content)
}

func TestBuildRefuses(t *testing.T) {
	content := sample()
	t.Run("changed", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x")
		src := newMemSource(content)
		src.onRead = func(off int64) error {
			if off == layer.ChunkSize {
				src.stamp.Ctime++
			}
			return nil
		}
		if _, err := Build(t.Context(), src, path, Options{Workers: 1}); !errors.Is(err, ErrChanged) {
			t.Errorf("%v, want ErrChanged", err)
		}
		only(t, path)
	})
	t.Run("busy", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x")
		other, err := os.Create(path + journalSuffix)
		if err != nil {
			t.Fatal(err)
		}
		defer other.Close()
		if err := unix.Flock(int(other.Fd()), unix.LOCK_EX); err != nil {
			t.Fatal(err)
		}
		if _, err := Build(t.Context(), newMemSource(content), path, Options{}); !errors.Is(err, ErrBusy) {
			t.Errorf("%v, want ErrBusy", err)
		}
	})
	t.Run("shorter than it says", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "x")
		src := newMemSource(content)
		src.onRead = func(off int64) error {
			if off >= 3*layer.ChunkSize {
				return io.EOF
			}
			return nil
		}
		if _, err := Build(t.Context(), src, path, Options{}); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Errorf("%v, want ErrUnexpectedEOF", err)
		}
	})
	t.Run("no folder", func(t *testing.T) {
		path := filepath.Join(t.TempDir(), "missing", "x")
		if _, err := Build(t.Context(), newMemSource(content), path, Options{}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), path) {
			t.Errorf("%v, want ErrNotExist with the path", err)
		}
	})
}

func TestStale(t *testing.T) {
	content := sample()
	path := filepath.Join(t.TempDir(), "x")
	src := newMemSource(content)
	mustBuild(t, src, path, Options{})
	x := mustOpen(t, path)
	for name, change := range map[string]func(*memSource){
		"longer":    func(m *memSource) { m.content = append(m.content, 0) },
		"shorter":   func(m *memSource) { m.content = m.content[:len(m.content)-layer.BlockSize] },
		"written":   func(m *memSource) { m.stamp.Mtime++ },
		"attribute": func(m *memSource) { m.stamp.Ctime++ },
		"replaced":  func(m *memSource) { m.stamp.Inode++ },
		// Behind the stamp's back: only samples can tell.
		"zeroed": func(m *memSource) { clear(m.content) },
		"filled": func(m *memSource) { m.content = bytes.Repeat([]byte{3}, len(m.content)) },
	} {
		changed := newMemSource(bytes.Clone(content))
		change(changed)
		if err := x.Check(changed, 200); !errors.Is(err, ErrStale) {
			t.Errorf("%s: %v, want ErrStale", name, err)
		}
	}
}

// TestRealFile indexes a sparse file through layer.File.
func TestRealFile(t *testing.T) {
	dir := t.TempDir()
	disk := filepath.Join(dir, "disk")
	f, err := os.Create(disk)
	if err != nil {
		t.Fatal(err)
	}
	content := make([]byte, 40<<20)
	copy(content[17<<20:], sample()[:3<<20])
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(content[17<<20:20<<20], 17<<20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	src, err := layer.OpenFile(disk)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	path := filepath.Join(dir, "x")
	built := mustBuild(t, src, path, Options{})
	x := mustOpen(t, path)
	compareWithContent(t, x, content)
	t.Logf("%d of %d bytes read", built.Read, src.Size())
	if err := x.Check(src, 50); err != nil {
		t.Error(err)
	}
	if err := os.WriteFile(disk, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := x.Check(src, 0); !errors.Is(err, ErrStale) {
		t.Errorf("after a write: %v, want ErrStale", err)
	}
}

// TestOpenRefuses: no index that was cut off or altered anywhere opens.
func TestOpenRefuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "x")
	mustBuild(t, newMemSource(sample()), path, Options{})
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	refuse := func(what string, b []byte) {
		t.Helper()
		bad := filepath.Join(t.TempDir(), "bad")
		if err := os.WriteFile(bad, b, 0o600); err != nil {
			t.Fatal(err)
		}
		if x, err := Open(bad); !errors.Is(err, ErrFormat) {
			t.Errorf("%s: %v, want ErrFormat", what, err)
			if err == nil {
				_ = x.Close()
			}
		}
	}
	rng := rand.New(rand.NewPCG(3, 3))
	for _, n := range []int{0, 1, headerSize - 1, headerSize, len(good) / 2, len(good) - 1} {
		refuse(fmt.Sprintf("%d bytes", n), good[:n])
	}
	refuse("longer", append(bytes.Clone(good), 0))
	for range 40 {
		b := bytes.Clone(good)
		at := rng.IntN(len(b))
		b[at] ^= 1 << rng.IntN(8)
		refuse(fmt.Sprintf("byte %d altered", at), b)
	}
	for at := range headerSize {
		b := bytes.Clone(good)
		b[at] ^= 0x10
		if _, err := parse(b); !errors.Is(err, ErrFormat) {
			t.Errorf("byte %d of the header altered: %v", at, err)
		}
	}
	if _, err := Open(filepath.Join(t.TempDir(), "missing")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing index: %v", err)
	}
	if _, err := Open(t.TempDir()); err == nil {
		t.Error("a folder was opened as an index")
	}
}
