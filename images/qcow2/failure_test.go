package qcow2

import (
	"bytes"
	"errors"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"ditto.vm/internal/labtest"
)

// TestFailures lets reads, writes and flushes of the file fail now and then.
// Requests fail, and nothing else: what the disk holds is what was written, and
// the image is not damaged.
func TestFailures(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := Create(path, CreateOptions{Size: 1 << 20, ClusterSize: 4096}); err != nil {
		t.Fatal(err)
	}
	start, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	errInjected := errors.New("injected")
	for seed := range labtest.Count(10, 500) {
		rng := rand.New(rand.NewSource(int64(seed)))
		m := &memFile{data: bytes.Clone(start)}
		f, err := Open(m, Options{})
		if err != nil {
			t.Fatal(err)
		}
		m.fail = func(string) error {
			if rng.Intn(20) == 0 {
				return errInjected
			}
			return nil
		}
		model := make([]byte, 1<<20)
		unknown := make([]bool, len(model)/512) // a request on it failed
		for range 300 {
			at := rng.Intn(len(unknown))
			n := min(len(unknown)-at, 1+rng.Intn(40))
			err := failingStep(rng, f, model, at, n)
			if err != nil && !errors.Is(err, errInjected) {
				t.Fatal(err)
			}
			for i := at; i < at+n && err != nil; i++ {
				unknown[i] = true
			}
		}
		m.fail = nil
		got := make([]byte, len(model))
		if err := f.ReadAtv([][]byte{got}, 0); err != nil {
			t.Fatal(err)
		}
		for i := range unknown {
			if !unknown[i] && !bytes.Equal(got[i*512:][:512], model[i*512:][:512]) {
				t.Fatalf("seed %d: sector %d is not what was written", seed, i)
			}
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, m.data, 0o600); err != nil {
			t.Fatal(err)
		}
		judge(t, path)
	}
}

// failingStep writes, erases or flushes n sectors.
func failingStep(rng *rand.Rand, f *File, model []byte, at, n int) error {
	offset, size := int64(at)*512, int64(n)*512
	switch rng.Intn(6) {
	case 0:
		return f.Flush()
	case 1:
		clear(model[offset : offset+size])
		return f.WriteZeroes(offset, size, rng.Intn(2) == 0)
	default:
		rng.Read(model[offset : offset+size])
		return f.WriteAtv([][]byte{bytes.Clone(model[offset : offset+size])}, offset)
	}
}

// judge lets qemu-img check an image: it may leak, but not be damaged.
func judge(t *testing.T, path string) {
	t.Helper()
	out, err := exec.Command("qemu-img", "check", "-f", "qcow2", path).CombinedOutput()
	var exit *exec.ExitError
	switch {
	case errors.Is(err, exec.ErrNotFound):
		t.Skip("qemu-img is not installed; try: apt install qemu-utils")
	case err == nil, errors.As(err, &exit) && exit.ExitCode() == 3:
	default:
		t.Fatalf("%v\n%s", err, out)
	}
}
