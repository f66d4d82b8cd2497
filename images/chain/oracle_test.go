package chain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"ditto.vm/images/disk"
	"ditto.vm/internal/labtest"
)

// tool runs a command of QEMU's, or skips the test where it is not installed.
func tool(tb testing.TB, name string, args ...string) string {
	tb.Helper()
	out, code := status(tb, name, args...)
	if code != 0 {
		tb.Fatalf("%s %q: exit %d: %s", name, args, code, out)
	}
	return out
}

// status returns the exit code as well.
func status(tb testing.TB, name string, args ...string) (string, int) {
	tb.Helper()
	if _, err := exec.LookPath(name); err != nil {
		tb.Skipf("%s is not installed; try: apt install qemu-utils", name)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		tb.Fatal(err)
	}
	if exit != nil {
		return string(out), exit.ExitCode()
	}
	return string(out), 0
}

// twin is a disk and what must be in it.
type twin struct {
	c     *Chain
	model []byte
}

func openChain(tb testing.TB, path string, o Options) *Chain {
	tb.Helper()
	c, err := Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// readAll reads the whole disk.
func readAll(tb testing.TB, c disk.Image) []byte {
	tb.Helper()
	b := make([]byte, c.Size())
	for at := 0; at < len(b); at += 1 << 20 {
		if err := c.ReadAtv([][]byte{b[at:min(len(b), at+1<<20)]}, int64(at)); err != nil {
			tb.Fatalf("read at %#x: %v", at, err)
		}
	}
	return b
}

// step does one random operation to disk and model.
func (w *twin) step(rng *rand.Rand) error {
	size := len(w.model) / 512
	at := rng.Intn(size)
	n := min(size-at, 1+rng.Intn(1<<rng.Intn(9)))
	at, n = at*512, n*512
	switch rng.Intn(12) {
	case 0, 1, 2, 3, 4:
		data := make([]byte, n)
		rng.Read(data)
		copy(w.model[at:], data)
		cut := rng.Intn(n/512+1) * 512
		return w.c.WriteAtv([][]byte{data[:cut], data[cut:]}, int64(at))
	case 5:
		clear(w.model[at : at+n])
		return w.c.WriteAtv([][]byte{make([]byte, n)}, int64(at))
	case 6:
		clear(w.model[at : at+n])
		return w.c.WriteZeroes(int64(at), int64(n), rng.Intn(2) == 0)
	case 7:
		if err := w.c.Discard(int64(at), int64(n)); err != nil {
			return err
		}
		// It holds what it held, or zeros, in units of blocks.
		got := make([]byte, n)
		if err := w.c.ReadAtv([][]byte{got}, int64(at)); err != nil {
			return err
		}
		for i := range n {
			if got[i] != 0 && got[i] != w.model[at+i] {
				return fmt.Errorf("discard uncovered a strange byte at %#x", at+i)
			}
		}
		copy(w.model[at:], got)
		return nil
	case 8:
		return w.c.Flush()
	default:
		got := make([]byte, n)
		if err := w.c.ReadAtv([][]byte{got}, int64(at)); err != nil {
			return err
		}
		if !bytes.Equal(got, w.model[at:at+n]) {
			return fmt.Errorf("%d bytes at %#x differ from the model", n, at)
		}
		return nil
	}
}

// compare closes the disk and lets qemu-img judge it.
func (w *twin) compare(tb testing.TB) {
	tb.Helper()
	path := w.c.Path()
	if !bytes.Equal(readAll(tb, w.c), w.model) {
		tb.Error("disk and model differ")
	}
	format := w.c.top().Format()
	if err := w.c.Close(); err != nil {
		tb.Fatal(err)
	}
	if format == Qcow2 {
		tool(tb, "qemu-img", "check", "-f", "qcow2", path)
	}
	raw := filepath.Join(tb.TempDir(), "twin.raw")
	if err := os.WriteFile(raw, w.model, 0o600); err != nil {
		tb.Fatal(err)
	}
	tool(tb, "qemu-img", "compare", "-f", string(format), "-F", "raw", path, raw)
}

// creations are options of qemu-img create.
var creations = []string{
	"", "cluster_size=512", "cluster_size=2M", "cluster_size=4k", "compat=0.10",
	"compat=0.10,cluster_size=1k", "preallocation=metadata", "preallocation=falloc",
	"preallocation=full", "lazy_refcounts=on", "refcount_bits=1", "refcount_bits=2",
	"refcount_bits=8,cluster_size=512", "refcount_bits=64,cluster_size=512", "refcount_bits=32", "compression_type=zstd",
}

// TestRandom does random operations on images of all kinds.
func TestRandom(t *testing.T) {
	for _, o := range creations {
		for _, backed := range []bool{false, true} {
			if backed && len(o) > 13 && o[:13] == "preallocation" {
				continue
			}
			t.Run(fmt.Sprintf("%s,backed=%v", o, backed), func(t *testing.T) {
				t.Parallel()
				dir := t.TempDir()
				path := filepath.Join(dir, "disk.qcow2")
				rng := rand.New(rand.NewSource(1))
				const size = 8<<20 + 3*512
				w := twin{model: make([]byte, size)}
				args := []string{"create", "-q", "-f", "qcow2"}
				if o != "" {
					args = append(args, "-o", o)
				}
				if backed {
					base := make([]byte, size-1<<20+100)
					rng.Read(base[1<<20 : 5<<20])
					rng.Read(base[6<<20:])
					copy(w.model, base)
					if err := os.WriteFile(filepath.Join(dir, "base.raw"), base, 0o600); err != nil {
						t.Fatal(err)
					}
					args = append(args, "-b", "base.raw", "-F", "raw")
				}
				tool(t, "qemu-img", append(args, path, fmt.Sprint(size))...)
				for round := range labtest.Count(2, 20) {
					w.c = openChain(t, path, Options{})
					for i := range 120 {
						if err := w.step(rng); err != nil {
							t.Fatalf("round %d, step %d: %v", round, i, err)
						}
					}
					w.compare(t)
				}
			})
		}
	}
}
