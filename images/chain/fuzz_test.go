package chain

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// FuzzOpen opens chains whose top is anything, beside two images that it may
// name. Each is refused in one line, or can be read to its end.
func FuzzOpen(f *testing.F) {
	dir := f.TempDir()
	base, other := filepath.Join(dir, "base"), filepath.Join(dir, "other")
	if err := os.WriteFile(base, bytes.Repeat([]byte("base"), 1000), 0o600); err != nil {
		f.Fatal(err)
	}
	if err := CreateOverlay(other, base, Raw, 8192); err != nil {
		f.Fatal(err)
	}
	for i, below := range []struct {
		path   string
		format Format
	}{{base, Raw}, {other, Qcow2}, {filepath.Join(dir, "top"), Qcow2}, {filepath.Join(dir, "gone"), Raw}} {
		seed := filepath.Join(dir, "seed"+string(rune('0'+i)))
		// Small clusters make small seeds.
		o := qcow2.CreateOptions{Size: 64 << 10, ClusterSize: 512, Backing: below.path, BackingFormat: string(below.format)}
		if err := qcow2.Create(seed, o); err != nil {
			f.Fatal(err)
		}
		b, err := os.ReadFile(seed)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Fuzz(func(t *testing.T, image []byte) {
		path := filepath.Join(dir, "top")
		if err := os.WriteFile(path, image, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Open(path, Options{ReadOnly: true})
		if err != nil {
			var e *disk.Error
			if !errors.As(err, &e) || e.Path == "" || e.Cure == "" {
				t.Errorf("error %v names no path and no cure", err)
			}
			return
		}
		defer c.Close()
		top := c.Layers()[0]
		for at, n := int64(0), 0; at < c.Size() && n < 1000; n++ {
			start, end, err := top.NextData(at)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return
			}
			if start < at || end <= start {
				t.Fatalf("next data at %d is %d to %d", at, start, end)
			}
			_, _ = top.ReadAt(make([]byte, min(4096, end-start)), start)
			at = end
		}
	})
}
