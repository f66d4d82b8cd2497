package layer

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// contentOf computes the identity of bytes without skipping anything.
func contentOf(content []byte) ID {
	h := NewContentHasher(int64(len(content)))
	blocks := len(content) / BlockSize
	for first := 0; first < blocks; first += ChunkBlocks {
		var digests [ChunkBlocks]Digest
		for i := first; i < min(first+ChunkBlocks, blocks); i++ {
			if b := content[i*BlockSize:][:BlockSize]; !IsZero(b) {
				digests[i-first] = Sum(b)
			}
		}
		h.Chunk(int64(first/ChunkBlocks), &digests)
	}
	return h.ID(content[blocks*BlockSize:])
}

func TestID(t *testing.T) {
	written, content := NewWritten(), contentOf([]byte("x"))
	if written == NewWritten() {
		t.Error("two written layers have the same identity")
	}
	if written.Kind() != Written || content.Kind() != Content || (ID{}).Kind() != Unknown {
		t.Errorf("kinds %d, %d, %d", written.Kind(), content.Kind(), ID{}.Kind())
	}
	for _, id := range []ID{written, content} {
		text, err := json.Marshal(id)
		var back ID
		if err != nil || json.Unmarshal(text, &back) != nil || back != id {
			t.Errorf("%s became %s as %s", id, back, text)
		}
	}
	for _, bad := range []string{"", "x", written.String() + "0", "00000000-0000-0000-0000-000000000000",
		"0123456789abcdef0123456789abcdef0123", "gggggggg-0000-4000-8000-000000000000",
		"AAAAAAAA-0000-4000-8000-000000000000", "aaaaaaaa-0000-1000-8000-000000000000", "aaaaaaaa.0000-4000-8000-000000000000"} {
		var id ID
		if err := id.UnmarshalText([]byte(bad)); err == nil {
			t.Errorf("%q was read as %s", bad, id)
		}
	}
}

// TestContentGolden pins the identity: it is stored and sent to other hosts.
func TestContentGolden(t *testing.T) {
	big := bytes.Repeat([]byte("0123456789abcdef"), (ChunkSize+3*BlockSize)/16)
	for _, tt := range []struct {
		name    string
		content []byte
		want    string
	}{
		{"empty", nil, goldenEmpty},
		{"one zero block", make([]byte, BlockSize), goldenZero},
		{"two chunks", big, goldenBig},
		{"with a tail", append(bytes.Clone(big), "tail"...), goldenTail},
	} {
		if got := contentOf(tt.content).String(); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
}

const (
	goldenEmpty = "fd1b77d1-ad9a-8cf2-8a80-22b158f3d3b5"
	goldenZero  = "72a85006-99f4-8670-96ce-1a4164dd4041"
	goldenBig   = "6f19b976-db64-8b1e-9ab8-35b3509b07f9"
	goldenTail  = "8376b1a8-4e0f-8549-92c9-8cf4a674ab04"
)

// TestContentDiffers: every change changes the identity, and leaving zero
// chunks out does not.
func TestContentDiffers(t *testing.T) {
	base := make([]byte, 3*ChunkSize+2*BlockSize)
	base[5], base[2*ChunkSize+9], base[len(base)-1] = 1, 2, 3
	seen := map[ID]string{contentOf(base): "base"}
	note := func(name string, content []byte) {
		id := contentOf(content)
		if other, ok := seen[id]; ok {
			t.Errorf("%s has the identity of %s", name, other)
		}
		seen[id] = name
	}
	for _, at := range []int{0, BlockSize, ChunkSize, len(base) - 2} {
		changed := bytes.Clone(base)
		changed[at] ^= 1
		note("changed byte", changed)
	}
	swapped := bytes.Clone(base)
	copy(swapped, base[ChunkSize:2*ChunkSize])
	copy(swapped[ChunkSize:], base[:ChunkSize])
	note("swapped chunks", swapped)
	note("one block more", append(bytes.Clone(base), make([]byte, BlockSize)...))
	note("one byte more", append(bytes.Clone(base), 0))
	note("two bytes more", append(bytes.Clone(base), 0, 0))
	note("one block less", base[:len(base)-BlockSize])

	sparse := NewContentHasher(4 * ChunkSize)
	whole := NewContentHasher(4 * ChunkSize)
	var zeros, some [ChunkBlocks]Digest
	some[7][3] = 1
	sparse.Chunk(2, &some)
	whole.Chunk(0, &zeros)
	whole.Chunk(1, &zeros)
	whole.Chunk(2, &some)
	whole.Chunk(3, &zeros)
	if a, b := sparse.ID(nil), whole.ID(nil); a != b {
		t.Errorf("left-out zero chunks make %s of %s", a, b)
	}
}

func TestFile(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	raw, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer raw.Close()
	if err := raw.Truncate(64 << 20); err != nil {
		t.Fatal(err)
	}
	if _, err := raw.WriteAt([]byte("data"), 32<<20); err != nil {
		t.Fatal(err)
	}
	f, err := OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.Size() != 64<<20 {
		t.Errorf("size %d", f.Size())
	}
	var covered int64
	found := false
	for off := int64(0); ; {
		start, end, err := f.NextData(off)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil || start < off || end <= start || end > f.Size() {
			t.Fatalf("NextData(%d) = %d, %d, %v", off, start, end, err)
		}
		covered += end - start
		found = found || start <= 32<<20 && end >= 32<<20+4
		off = end
	}
	if !found || covered > 64<<20 {
		t.Errorf("%d bytes of data, the written ones among them: %v", covered, found)
	}
	b := make([]byte, 4)
	if _, err := f.ReadAt(b, 32<<20); err != nil || string(b) != "data" {
		t.Errorf("read %q, %v", b, err)
	}
}

func TestOpenFileRefuses(t *testing.T) {
	dir := t.TempDir()
	fifo := filepath.Join(dir, "fifo")
	if err := unix.Mkfifo(fifo, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dir, fifo, "/dev/zero", filepath.Join(dir, "missing")} {
		if f, err := OpenFile(path); err == nil {
			_ = f.Close()
			t.Errorf("%s was opened as a layer", path)
		}
	}
}

// TestStamp: each way of changing a file changes its stamp.
func TestStamp(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, BlockSize), 0o600); err != nil {
		t.Fatal(err)
	}
	past := time.Unix(1e9, 0)
	if err := os.Chtimes(path, past, past); err != nil {
		t.Fatal(err)
	}
	stamp := func() Stamp {
		t.Helper()
		f, err := OpenFile(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		s, err := f.Stamp()
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	before := stamp()
	if d := before.Difference(stamp()); d != "" {
		t.Errorf("an unchanged file differs: %s", d)
	}
	for _, tt := range []struct {
		name   string
		change func() error
	}{
		{"write", func() error { return os.WriteFile(path, make([]byte, BlockSize), 0o600) }},
		{"truncate", func() error { return os.Truncate(path, 2*BlockSize) }},
		{"replace", func() error {
			if err := os.WriteFile(path+"2", make([]byte, 2*BlockSize), 0o600); err != nil {
				return err
			}
			return os.Rename(path+"2", path)
		}},
	} {
		before := stamp()
		if err := tt.change(); err != nil {
			t.Fatal(err)
		}
		if before.Difference(stamp()) == "" {
			t.Errorf("%s left the stamp as it was", tt.name)
		}
	}
	a := Stamp{Mtime: 1, Ctime: 1}
	if a.Difference(Stamp{Mtime: 1, Ctime: 2}) == "" {
		t.Error("a changed ctime is no difference")
	}
}

// BenchmarkSum is the floor of every build of an index.
func BenchmarkSum(b *testing.B) {
	block := bytes.Repeat([]byte("0123456789abcdef"), BlockSize/16)
	b.SetBytes(BlockSize)
	for b.Loop() {
		_ = Sum(block)
	}
}

// BenchmarkIsZero reads a block of zeros.
func BenchmarkIsZero(b *testing.B) {
	block := make([]byte, BlockSize)
	b.SetBytes(BlockSize)
	for b.Loop() {
		if !IsZero(block) {
			b.Fatal("not zero")
		}
	}
}
