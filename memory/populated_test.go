package memory

import (
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// populatedOf lists the runs of r.
func populatedOf(t *testing.T, s *Space, r Range) []Range {
	t.Helper()
	var got []Range
	if err := s.Populated(r, func(r Range) { got = append(got, r) }); err != nil {
		t.Fatal(err)
	}
	return got
}

func expectRanges(t *testing.T, what string, got, want []Range) {
	t.Helper()
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("%s: populated %v, want %v", what, got, want)
	}
}

func TestPopulated(t *testing.T) {
	for _, backing := range []Backing{Anonymous, Memfd} {
		s := small(t, Config{Size: 3<<30 + 4<<20, Backing: backing, HugePages: HugePagesOff})
		for _, r := range []Range{{0, 2 * PageSize}, {5 * PageSize, 3 * PageSize}, {HoleEnd + PageSize, PageSize}} {
			if err := s.WriteAt(make([]byte, r.Size), r.Start); err != nil {
				t.Fatal(err)
			}
		}
		if err := s.Discard(6*PageSize, PageSize); err != nil {
			t.Fatal(err)
		}
		before, err := s.HostUsage()
		if err != nil {
			t.Fatal(err)
		}
		expectRanges(t, backing.String(), populatedOf(t, s, s.regions[0].Range), []Range{{0, 2 * PageSize}, {5 * PageSize, PageSize}, {7 * PageSize, PageSize}})
		expectRanges(t, backing.String()+" high", populatedOf(t, s, s.regions[1].Range), []Range{{HoleEnd + PageSize, PageSize}})
		expectRanges(t, backing.String()+" part", populatedOf(t, s, Range{PageSize, 5 * PageSize}), []Range{{PageSize, PageSize}, {5 * PageSize, PageSize}})
		expectRanges(t, backing.String()+" none", populatedOf(t, s, Range{PageSize, 0}), nil)
		if after, err := s.HostUsage(); err != nil || after.RSS != before.RSS {
			t.Errorf("%s: looking changed resident memory from %d to %d bytes (%v)", backing, before.RSS, after.RSS, err)
		}
		if err := s.Populated(Range{HoleStart - PageSize, 2 * PageSize}, nil); !errors.Is(err, ErrOutOfRange) {
			t.Errorf("%s: a range across the hole: %v", backing, err)
		}
	}
}

// TestPopulatedZeroPage: a page that was only read is the host's page of zeros.
func TestPopulatedZeroPage(t *testing.T) {
	s := small(t, Config{Size: 4 << 20, HugePages: HugePagesOff})
	if got := make([]byte, 4*PageSize); s.ReadAt(got, 0) != nil || s.WriteAt(got[:1], PageSize) != nil {
		t.Fatal("no access")
	}
	expectRanges(t, "read and written", populatedOf(t, s, s.regions[0].Range), []Range{{PageSize, PageSize}})
}

// TestPopulatedUnmapped: what this process's page tables have lost is still in
// the file.
func TestPopulatedUnmapped(t *testing.T) {
	s := small(t, Config{Size: 4 << 20, Backing: Memfd, HugePages: HugePagesOff})
	if err := s.WriteAt([]byte{1}, 3*PageSize); err != nil {
		t.Fatal(err)
	}
	if err := unix.Madvise(s.regions[0].mem, unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	expectRanges(t, "unmapped", populatedOf(t, s, s.regions[0].Range), []Range{{3 * PageSize, PageSize}})
}

// TestPopulatedEntries: the way of old kernels agrees, but for the page of
// zeros.
func TestPopulatedEntries(t *testing.T) {
	s := small(t, Config{Size: 8 << 20, HugePages: HugePagesOff})
	for _, i := range []int{0, 1, 511, 512, 600, 1023, 2047} {
		s.regions[0].mem[i*PageSize] = 1
	}
	for _, r := range []Range{s.regions[0].Range, {PageSize, 2 << 20}, {600 * PageSize, PageSize}, {PageSize * 2, PageSize}} {
		p, err := s.locate(r)
		if err != nil {
			t.Fatal(err)
		}
		var old []Range
		if err := s.populatedEntries(p, func(r Range) { old = append(old, r) }); err != nil {
			t.Fatal(err)
		}
		expectRanges(t, fmt.Sprint(r), old, populatedOf(t, s, r))
	}
}

func TestPopulatedClosed(t *testing.T) {
	s, err := New(Config{Size: 4 << 20})
	if err != nil {
		t.Fatal(err)
	}
	all := s.regions[0].Range
	region := s.regions[0]
	if err := errors.Join(s.Close(), s.Close()); err != nil {
		t.Errorf("closing twice: %v", err)
	}
	if err := s.populatedPages(part{region: &region, Range: all}, nil); !errors.Is(err, os.ErrClosed) {
		t.Errorf("a closed Space: %v", err)
	}
}
