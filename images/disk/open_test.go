package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// makeDisk makes a raw image of n bytes and returns its path.
func makeDisk(tb testing.TB, n int64) string {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk.raw")
	f, err := os.Create(path)
	if err != nil {
		tb.Fatal(err)
	}
	if err := errors.Join(f.Truncate(n), f.Close()); err != nil {
		tb.Fatal(err)
	}
	return path
}

func open(tb testing.TB, path string, o Options) *Raw {
	tb.Helper()
	r, err := Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := r.Close(); err != nil {
			tb.Error(err)
		}
	})
	return r
}

func TestOpenErrors(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	write := func(name, content string, mode os.FileMode) string {
		if err := os.WriteFile(at(name), []byte(content), mode); err != nil {
			t.Fatal(err)
		}
		return at(name)
	}
	if err := unix.Mkfifo(at("fifo"), 0o600); err != nil {
		t.Fatal(err)
	}
	sector := string(make([]byte, 512))
	for _, c := range []struct {
		name, path string
		options    Options
		want       string // in the error, "" for none
	}{
		{"missing", at("missing"), Options{}, "does not exist"},
		{"directory", dir, Options{}, "is a directory"},
		{"directory read-only", dir, Options{ReadOnly: true}, "is a directory"},
		{"fifo", at("fifo"), Options{}, "neither a file nor a block device"},
		{"character device", "/dev/null", Options{}, "neither a file nor a block device"},
		{"empty", write("empty", "", 0o600), Options{}, "is empty"},
		{"odd size", write("odd", "x"+sector, 0o600), Options{}, "513 bytes, is not a multiple of 512"},
		{"qcow2", write("qcow2", "QFI\xfb"+sector[4:], 0o600), Options{}, "is a qcow2 image"},
		{"qcow2 taken as raw", at("qcow2"), Options{Raw: true}, ""},
		{"vmdk", write("vmdk", "KDMV"+sector[4:], 0o600), Options{}, "is a VMDK image"},
		{"raw", write("raw", sector, 0o600), Options{}, ""},
		{"read-only", write("ro", sector, 0o400), Options{ReadOnly: true}, ""},
		{"frozen", write("frozen", sector, 0o444), Options{}, "is frozen"},
		{"frozen read-only", at("frozen"), Options{ReadOnly: true}, ""},
		{"name too long", at(strings.Repeat("x", 300)), Options{}, "file name too long"},
	} {
		t.Run(c.name, func(t *testing.T) {
			r, err := Open(c.path, c.options)
			if err == nil {
				_ = r.Close()
			}
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want != "" && err == nil:
				t.Error("accepted")
			case c.want != "":
				var e *Error
				if !errors.As(err, &e) || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") || e.Cure == "" {
					t.Errorf("error %q, want one line with %q and a cure", err, c.want)
				}
			}
		})
	}
}

// TestOpenWithoutRights needs to be somebody else than root.
func TestOpenWithoutRights(t *testing.T) {
	for _, o := range []Options{{}, {ReadOnly: true}} {
		err := openError("disk", o, unix.EACCES)
		if !strings.Contains(err.Error(), "no permission") || !errors.Is(err, unix.EACCES) {
			t.Errorf("error %q", err)
		}
	}
}

func TestIdentity(t *testing.T) {
	path := makeDisk(t, 1<<20)
	a := open(t, path, Options{ReadOnly: true})
	b := open(t, path, Options{ReadOnly: true})
	if a.Identity() != b.Identity() {
		t.Errorf("one file has identities %v and %v", a.Identity(), b.Identity())
	}
	if other := open(t, makeDisk(t, 1<<20), Options{}); other.Identity() == a.Identity() {
		t.Errorf("two files have identity %v", a.Identity())
	}
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if c := open(t, path, Options{ReadOnly: true}); c.Identity() == a.Identity() {
		t.Error("a changed file keeps its identity")
	}
}

func TestCacheText(t *testing.T) {
	for _, c := range []Cache{CacheWriteback, CacheNone, CacheWritethrough} {
		text, err := c.MarshalText()
		var back Cache
		if err != nil || back.UnmarshalText(text) != nil || back != c {
			t.Errorf("%v does not survive as text", c)
		}
	}
	if err := new(Cache).UnmarshalText([]byte("unsafe")); err == nil {
		t.Error("unknown mode accepted")
	}
}
