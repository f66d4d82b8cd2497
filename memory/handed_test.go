package memory

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// pageOf returns a page of a Space, to read and write.
func pageOf(t *testing.T, s *Space, gpa GPA) []byte {
	t.Helper()
	b, err := s.Writable(gpa, PageSize)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// handOver opens the memory of a Space a second time.
func handOver(t *testing.T, s *Space, config Config) *Space {
	t.Helper()
	files, err := s.Files()
	if err != nil {
		t.Fatal(err)
	}
	second, err := Open(config, files)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := second.Close(); err != nil {
			t.Error(err)
		}
	})
	return second
}

// TestOpen: until memory is adopted nothing that is written there reaches its first
// owner; what was written since the last Clear does then, and from then on all.
func TestOpen(t *testing.T) {
	config := Config{Size: 3<<30 + 4<<20, Backing: Memfd} // two files
	first := small(t, config)
	const kept, written, last = GPA(0), GPA(3 * PageSize), GPA(4<<30 + PageSize)
	for _, gpa := range []GPA{kept, written, last} {
		pageOf(t, first, gpa)[5] = 1
	}
	second := handOver(t, first, config)
	for _, gpa := range []GPA{kept, written, last} {
		if pageOf(t, second, gpa)[5] != 1 {
			t.Errorf("%s was not handed over", gpa)
		}
		pageOf(t, second, gpa)[5] = 2
		if pageOf(t, first, gpa)[5] != 1 {
			t.Fatalf("%s was changed before it was adopted", gpa)
		}
	}
	if err := second.Discard(kept, PageSize); err != nil {
		t.Fatal(err)
	}
	if pageOf(t, first, kept)[5] != 1 {
		t.Fatal("a page was discarded before it was adopted")
	}
	if files, err := second.Files(); err != nil || files != nil {
		t.Errorf("it is handed on before it was adopted: %v, %v", files, err)
	}
	if err := second.Clear(); err != nil {
		t.Fatal(err)
	}
	pageOf(t, first, kept)[5] = 3 // the first goes on meanwhile
	pageOf(t, second, last)[7] = 4
	if got := pageOf(t, second, written)[5]; got != 1 {
		t.Errorf("what was cleared is still there: %d", got)
	}
	if err := second.Adopt(); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Space{first, second} {
		got := []byte{pageOf(t, s, kept)[5], pageOf(t, s, written)[5], pageOf(t, s, last)[5], pageOf(t, s, last)[7]}
		if want := []byte{3, 1, 1, 4}; !bytes.Equal(got, want) {
			t.Errorf("adopted, memory holds %d, want %d", got, want)
		}
	}
	pageOf(t, second, kept)[5] = 6
	if pageOf(t, first, kept)[5] != 6 {
		t.Error("adopted memory is not the same")
	}
	if err := second.Adopt(); err != nil {
		t.Errorf("adopted twice: %v", err)
	}
}

// TestAdoptTooMuch: what was written before is bounded, and nothing of it gets out.
func TestAdoptTooMuch(t *testing.T) {
	config := Config{Size: maxCarried + 4<<20, Backing: Memfd, HugePages: HugePagesOff}
	first := small(t, config)
	second := handOver(t, first, config)
	for gpa := GPA(0); gpa <= maxCarried; gpa += PageSize {
		pageOf(t, second, gpa)[0] = 1
	}
	if err := second.Adopt(); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("error %v", err)
	}
	if pageOf(t, first, 0)[0] != 0 {
		t.Error("a part was carried over")
	}
}

// TestOpenRefuses: files that are not what New makes are refused, and closed.
func TestOpenRefuses(t *testing.T) {
	const size = 4 << 20
	memfd := func(seals int, bytes int64) *os.File {
		fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Ftruncate(fd, bytes); err != nil {
			t.Fatal(err)
		}
		if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, seals); err != nil {
			t.Fatal(err)
		}
		return os.NewFile(uintptr(fd), "test")
	}
	reopened := func(f *os.File) *os.File {
		defer f.Close()
		r, err := os.Open(filepath.Join("/proc/self/fd", strconv.Itoa(int(f.Fd()))))
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	plain, err := os.Create(filepath.Join(t.TempDir(), "file"))
	if err != nil {
		t.Fatal(err)
	}
	if err := plain.Truncate(size); err != nil {
		t.Fatal(err)
	}
	shared, huge := Config{Size: size, Backing: Memfd}, Config{Size: size, Backing: Memfd, HugePages: HugePages2M}
	for name, test := range map[string]struct {
		config Config
		files  []*os.File
		want   string
	}{
		"none":         {shared, nil, "0 files for 1 ranges"},
		"too many":     {shared, []*os.File{memfd(sealed, size), memfd(sealed, size)}, "2 files for 1 ranges"},
		"anonymous":    {Config{Size: size}, []*os.File{memfd(sealed, size)}, "cannot be handed over"},
		"short":        {shared, []*os.File{memfd(sealed, size/2)}, "instead of a memfd of"},
		"not sealed":   {shared, []*os.File{memfd(unix.F_SEAL_GROW, size)}, "size must be sealed"},
		"write sealed": {shared, []*os.File{memfd(sealed|unix.F_SEAL_FUTURE_WRITE, size)}, "bytes must not"},
		"read only":    {shared, []*os.File{reopened(memfd(sealed, size))}, "cannot be read and written"},
		"a file":       {shared, []*os.File{plain}, "it is no memfd"},
		"small pages":  {huge, []*os.File{memfd(sealed, size)}, "it is of a file system"},
	} {
		t.Run(name, func(t *testing.T) {
			s, err := Open(test.config, test.files)
			if err == nil {
				_ = s.Close()
			}
			if err == nil || !strings.Contains(err.Error(), test.want) {
				t.Errorf("error %v, want %q", err, test.want)
			}
			for _, f := range test.files {
				if _, err := f.Seek(0, io.SeekCurrent); err == nil {
					t.Error("a file is left open")
				}
			}
		})
	}
}
