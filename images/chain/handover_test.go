package chain

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/images/disk"
)

// TestRelease: a disk that is given up is another's; whoever gave it up gets it
// back if the other has gone and has not written.
func TestRelease(t *testing.T) {
	for _, format := range []Format{Raw, Qcow2} {
		for _, tc := range []struct {
			name string
			// other does something with the disk that was given up, and may leave it
			// open.
			other func(t *testing.T, path string) *Chain
			want  error
		}{
			{"nobody", func(*testing.T, string) *Chain { return nil }, nil},
			{"opened and closed", func(t *testing.T, path string) *Chain {
				return closed(t, openChain(t, path, Options{Format: format}))
			}, nil},
			{"open", func(t *testing.T, path string) *Chain { return openChain(t, path, Options{Format: format}) }, disk.ErrLocked},
			{"written", func(t *testing.T, path string) *Chain {
				c := openChain(t, path, Options{Format: format})
				if err := c.WriteAtv([][]byte{bytes.Repeat([]byte{7}, 4096)}, 4096); err != nil {
					t.Fatal(err)
				}
				return closed(t, c)
			}, disk.ErrWritten},
			{"cut short", func(t *testing.T, path string) *Chain {
				if err := os.Truncate(path, 1<<19); err != nil {
					t.Fatal(err)
				}
				return nil
			}, disk.ErrWritten},
		} {
			t.Run(string(format)+"/"+tc.name, func(t *testing.T) {
				base, path := filepath.Join(t.TempDir(), "base"), filepath.Join(t.TempDir(), "disk")
				if err := create(base, Raw, 1<<20); err != nil {
					t.Fatal(err)
				}
				var err error
				if format == Qcow2 {
					err = CreateOverlay(path, base, Raw, 1<<20)
				} else {
					err = create(path, Raw, 1<<20)
				}
				if err != nil {
					t.Fatal(err)
				}
				c := openChain(t, path, Options{Format: format})
				data := bytes.Repeat([]byte{1}, 4096)
				if err := errors.Join(c.WriteAtv([][]byte{data}, 8192), c.Release(), c.Release()); err != nil {
					t.Fatal(err)
				}
				other := tc.other(t, path)
				if err := c.Reclaim(); !errors.Is(err, tc.want) {
					t.Fatalf("taken back: %v, want %v", err, tc.want)
				}
				if other != nil {
					closed(t, other)
				}
				if tc.want == disk.ErrWritten {
					before := contentOf(t, path)
					closed(t, c)
					if !bytes.Equal(before, contentOf(t, path)) {
						t.Error("a disk that is another's was written when it was closed")
					}
					return
				}
				got := make([]byte, 4096)
				err = errors.Join(c.Reclaim(), c.DropCache(), c.ReadAtv([][]byte{got}, 8192), c.WriteAtv([][]byte{data}, 0))
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("the disk is not what it was: %v", err)
				}
				if _, err := Open(path, Options{Format: format}); !errors.Is(err, disk.ErrLocked) {
					t.Errorf("the disk that was taken back is open twice: %v", err)
				}
				closed(t, c)
				closed(t, openChain(t, path, Options{Format: format}))
			})
		}
	}
}

// TestUnlocked: who does not lock reads beside a writer, and writes nothing.
func TestUnlocked(t *testing.T) {
	dir := t.TempDir()
	base, top := filepath.Join(dir, "base.raw"), filepath.Join(dir, "top.qcow2")
	if err := errors.Join(create(base, Raw, 1<<20), CreateOverlay(top, base, Raw, 1<<20)); err != nil {
		t.Fatal(err)
	}
	c := openChain(t, top, Options{})
	if err := errors.Join(c.WriteAtv([][]byte{bytes.Repeat([]byte{3}, 4096)}, 4096), c.Flush()); err != nil {
		t.Fatal(err)
	}
	before := contentOf(t, top)
	beside, err := Open(top, Options{Unlocked: true})
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 4096)
	if err := beside.ReadAtv([][]byte{got}, 4096); err != nil || got[0] != 3 || !beside.ReadOnly() {
		t.Errorf("read %d, %v; read-only %t", got[0], err, beside.ReadOnly())
	}
	closed(t, beside)
	if !bytes.Equal(before, contentOf(t, top)) {
		t.Error("a reader has written")
	}
	closed(t, c)
}

func closed(t *testing.T, c *Chain) *Chain {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	return nil
}

func contentOf(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
