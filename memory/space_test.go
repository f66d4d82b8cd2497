package memory

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// small makes an anonymous Space of size bytes that the test closes.
func small(t testing.TB, config Config) *Space {
	t.Helper()
	s, err := New(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func TestLayout(t *testing.T) {
	const gib = 1 << 30
	for _, tt := range []struct {
		size uint64
		want []Range
	}{
		{128 << 20, []Range{{0, 128 << 20}}},
		{3 * gib, []Range{{0, 3 * gib}}},
		{3*gib + PageSize, []Range{{0, 3 * gib}, {4 * gib, PageSize}}},
		{6 * gib, []Range{{0, 3 * gib}, {4 * gib, 3 * gib}}},
	} {
		got, err := Layout(tt.size)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(tt.want) {
			t.Errorf("Layout(%#x) = %v, %v, want %v", tt.size, got, err, tt.want)
		}
	}
	for _, size := range []uint64{0, MinSize - PageSize, MinSize + 1, MaxSize + PageSize} {
		if got, err := Layout(size); err == nil {
			t.Errorf("Layout(%#x) = %v, want an error", size, got)
		}
	}
}

// TestCongruence: a large frame of the guest must be a large frame of the host.
func TestCongruence(t *testing.T) {
	for _, backing := range []Backing{Anonymous, Memfd} {
		s := small(t, Config{Size: 3<<30 + 6<<20, Backing: backing})
		if len(s.Regions()) != 2 {
			t.Fatalf("%d regions, want 2", len(s.Regions()))
		}
		for _, r := range s.Regions() {
			if uint64(r.Start)%LargeFrameSize != uint64(r.HVA)%LargeFrameSize {
				t.Errorf("%s: GPA %s and HVA %s differ modulo 2 MiB", backing, r.Start, r.HVA)
			}
		}
	}
}

func TestAccessBounds(t *testing.T) {
	s := small(t, Config{Size: 3<<30 + 1<<20})
	for _, tt := range []struct {
		gpa GPA
		n   uint64
		ok  bool
	}{
		{0, 1, true},
		{HoleStart - 1, 1, true},
		{HoleStart - 1, 2, false},
		{HoleStart, 1, false},
		{HoleEnd - 1, 2, false},
		{HoleEnd, 1 << 20, true},
		{HoleEnd, 1<<20 + 1, false},
		{0, 1 << 63, false},
		{^GPA(0), 2, false},
		{HoleEnd + 1<<20, 0, true},
	} {
		_, err := s.View(tt.gpa, tt.n)
		if (err == nil) != tt.ok {
			t.Errorf("View(%s, %#x): error %v, want ok %v", tt.gpa, tt.n, err, tt.ok)
		}
		if err != nil && !errors.Is(err, ErrOutOfRange) {
			t.Errorf("View(%s, %#x): %v does not wrap ErrOutOfRange", tt.gpa, tt.n, err)
		}
	}
	if err := s.WriteAt(make([]byte, 16), HoleStart-8); err == nil {
		t.Error("a write across the hole succeeded")
	}
}

// record is an observer that remembers what it heard.
type record []Range

func (r *record) HostWrite(gpa GPA, n uint64) { *r = append(*r, Range{gpa, n}) }

func TestObserver(t *testing.T) {
	s := small(t, Config{Size: 4 << 20})
	var heard record
	s.SetObserver(&heard)
	if err := s.WriteAt([]byte("abc"), 0x1ffe); err != nil {
		t.Fatal(err)
	}
	if err := s.Discard(0x1800, 0x2900); err != nil {
		t.Fatal(err)
	}
	want := record{{0x1ffe, 3}, {0x2000, 0x2000}}
	if fmt.Sprint(heard) != fmt.Sprint(want) {
		t.Errorf("observer heard %v, want %v", heard, want)
	}
	s.SetObserver(nil)
	if err := s.WriteAt([]byte("abc"), 0); err != nil || len(heard) != len(want) {
		t.Errorf("a removed observer heard %v, %v", heard, err)
	}
}

func TestDiscard(t *testing.T) {
	for _, backing := range []Backing{Anonymous, Memfd} {
		s := small(t, Config{Size: 4 << 20, Backing: backing})
		full := bytes.Repeat([]byte{0xaa}, 3*PageSize)
		if err := s.WriteAt(full, 0); err != nil {
			t.Fatal(err)
		}
		if err := s.Discard(1, 2*PageSize); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(full))
		if err := s.ReadAt(got, 0); err != nil {
			t.Fatal(err)
		}
		want := bytes.Clone(full)
		clear(want[PageSize : 2*PageSize])
		if !bytes.Equal(got, want) {
			t.Errorf("%s: the discarded page alone must read as zeros", backing)
		}
		if err := s.Discard(0, 8<<20); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("%s: discard beyond the end: %v", backing, err)
		}
		if err := s.Clear(); err != nil {
			t.Fatal(err)
		}
		if err := s.ReadAt(got, 0); err != nil || !bytes.Equal(got, make([]byte, len(got))) {
			t.Errorf("%s: memory is not zero after Clear (%v)", backing, err)
		}
	}
}

// TestHugePagesHint: where there is no such page size at all, filling its pool is
// no cure.
func TestHugePagesHint(t *testing.T) {
	for _, test := range []struct {
		pages HugePages
		err   error
		want  string
	}{
		{HugePages2M, unix.ENOMEM, "hugepages-2048kB/nr_hugepages"},
		{HugePages1G, unix.ENOMEM, "hugepages-1048576kB/nr_hugepages"},
		{HugePages1G, unix.EINVAL, "has no 1G huge pages: use --hugepages thp"},
		{HugePages2M, unix.ENODEV, "has no 2M huge pages: use --hugepages thp"},
		{HugePagesTHP, unix.EINVAL, unix.EINVAL.Error()},
		{HugePages2M, unix.EMFILE, unix.EMFILE.Error()},
	} {
		err := hugePagesHint(test.err, Config{HugePages: test.pages})
		if !errors.Is(err, test.err) || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%v of %s: %v, want %q", test.err, test.pages, err, test.want)
		}
	}
}

// TestHugePagesMissing: a pool that is too small is an error with a cure, not a
// fault later.
func TestHugePagesMissing(t *testing.T) {
	s, err := New(Config{Size: 1 << 40, HugePages: HugePages1G})
	if err == nil {
		_ = s.Close()
		t.Skip("this host has a pool of 1 TiB of huge pages; try: a smaller machine")
	}
	if want := "nr_hugepages"; !bytes.Contains([]byte(err.Error()), []byte(want)) {
		t.Errorf("error %q does not name %s", err, want)
	}
}
