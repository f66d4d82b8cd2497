package chain

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
	"ditto.vm/internal/labtest"
)

const testDepth = 16

func newQueue(tb testing.TB, c *Chain) disk.Queue {
	tb.Helper()
	q, err := c.NewQueue(testDepth)
	if err != nil {
		tb.Fatal(err)
	}
	return q
}

// wait returns the next completion.
func wait(q disk.Queue) (int, error) {
	for {
		if token, err, ok := q.Completed(); ok {
			return token, err
		}
		q.Wait()
	}
}

// makeBase makes a raw disk of n random bytes, with holes.
func makeBase(tb testing.TB, path string, rng *rand.Rand, n int) []byte {
	tb.Helper()
	b := make([]byte, n)
	for at := 0; at < n; at += 256 << 10 {
		if rng.Intn(3) > 0 {
			rng.Read(b[at:min(n, at+256<<10)])
		}
	}
	if err := os.WriteFile(path, b, 0o600); err != nil {
		tb.Fatal(err)
	}
	return b
}

// round keeps a random request in flight in each lane of the disk; lanes do
// not overlap.
func round(tb testing.TB, q disk.Queue, rng *rand.Rand, model []byte) {
	tb.Helper()
	type check struct{ got, want []byte }
	checks := map[int]check{}
	lane := len(model) / testDepth &^ 511
	for token := range testDepth {
		off := rng.Intn(lane/512) * 512
		n := (rng.Intn(min(lane-off, 1<<(10+rng.Intn(9)))/512) + 1) * 512
		n = min(n, lane-off)
		at := token*lane + off
		data := make([]byte, n)
		cut := rng.Intn(n/512+1) * 512
		bufs := [][]byte{data[:cut], data[cut:]}
		switch rng.Intn(8) {
		case 0, 1, 2:
			rng.Read(data)
			copy(model[at:], data)
			q.Write(token, bufs, int64(at), rng.Intn(8) == 0)
		case 3:
			clear(model[at : at+n])
			q.WriteZeroes(token, int64(at), int64(n), rng.Intn(2) == 0)
		case 4:
			if rng.Intn(4) == 0 {
				q.Flush(token)
				continue
			}
			fallthrough
		default:
			checks[token] = check{data, bytes.Clone(model[at : at+n])}
			q.Read(token, bufs, int64(at))
		}
	}
	q.Submit()
	for range testDepth {
		token, err := wait(q)
		if err != nil {
			tb.Fatalf("request %d: %v", token, err)
		}
		if c, ok := checks[token]; ok && !bytes.Equal(c.got, c.want) {
			tb.Fatalf("request %d read something else", token)
		}
	}
}

// TestQueue drives chains of several depths and clusters by queues, in every
// cache mode, and stacks overlays in between.
func TestQueue(t *testing.T) {
	ignore := goleak.IgnoreCurrent()
	t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
	for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone, disk.CacheWritethrough} {
		for _, format := range []Format{Raw, Qcow2} {
			t.Run(fmt.Sprintf("%s/%s", cache, format), func(t *testing.T) {
				dir, rng := t.TempDir(), rand.New(rand.NewSource(int64(cache)))
				const size = 4 << 20
				path := filepath.Join(dir, "layer0")
				w := twin{model: makeBase(t, path, rng, size)}
				if format == Qcow2 {
					path = filepath.Join(dir, "overlay")
					if err := CreateOverlay(path, filepath.Join(dir, "layer0"), Raw, size); err != nil {
						t.Fatal(err)
					}
				}
				w.c = openChain(t, path, Options{Cache: cache})
				q, other := newQueue(t, w.c), newQueue(t, w.c)
				for depth := range labtest.Count(4, 6) {
					for range labtest.Count(10, 100) {
						round(t, q, rng, w.model)
						round(t, other, rng, w.model)
					}
					next := filepath.Join(dir, fmt.Sprintf("layer%d", depth+1))
					if err := w.c.CreateOverlay(next); err != nil {
						t.Fatal(err)
					}
					stack := w.c.Stack
					if depth%2 == 1 {
						stack = func(path string) error { return stackFD(t, w.c, path, cache) }
					}
					if err := stack(next); err != nil {
						t.Fatal(err)
					}
				}
				round(t, q, rng, w.model)
				if err := errors.Join(q.Close(), other.Close()); err != nil {
					t.Fatal(err)
				}
				w.compare(t)
			})
		}
	}
}

// stackFD opens an overlay as another process would.
func stackFD(t *testing.T, c *Chain, path string, cache disk.Cache) error {
	t.Helper()
	flags, buffered := unix.O_RDWR|unix.O_CLOEXEC, -1
	if cache == disk.CacheNone {
		var err error
		if buffered, err = unix.Open(path, flags, 0); err != nil {
			t.Fatal(err)
		}
		flags |= unix.O_DIRECT
	}
	fd, err := unix.Open(path, flags, 0)
	if err != nil {
		t.Fatal(err)
	}
	return c.StackFD(path, fd, buffered)
}

// TestConcurrent lets several queues write different parts of the same
// clusters at once.
func TestConcurrent(t *testing.T) {
	dir := t.TempDir()
	const size, workers = 2 << 20, 4
	base := makeBase(t, filepath.Join(dir, "base"), rand.New(rand.NewSource(1)), size)
	path := filepath.Join(dir, "top")
	if err := CreateOverlay(path, filepath.Join(dir, "base"), Raw, size); err != nil {
		t.Fatal(err)
	}
	w := twin{c: openChain(t, path, Options{}), model: bytes.Clone(base)}
	errs := make(chan error)
	for i := range workers {
		go func() {
			rng := rand.New(rand.NewSource(int64(i)))
			var err error
			for range labtest.Count(1500, 50000) {
				// Each has its own sectors of every cluster.
				at := rng.Intn(size/4096)*4096 + i*1024
				b := make([]byte, 1024)
				rng.Read(b)
				switch rng.Intn(16) {
				case 0:
					err = errors.Join(err, w.c.Flush())
				case 1:
					clear(b)
					err = errors.Join(err, w.c.WriteZeroes(int64(at), 1024, true))
					copy(w.model[at:], b)
				default:
					err = errors.Join(err, w.c.WriteAtv([][]byte{b}, int64(at)))
					copy(w.model[at:], b)
				}
			}
			errs <- err
		}()
	}
	for range workers {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	w.compare(t)
}

// TestStack: blocks are found in the layer that holds them, frozen layers
// stay as they are, others may read them, and Unstack brings everything back.
func TestStack(t *testing.T) {
	for _, format := range []Format{Raw, Qcow2} {
		t.Run(string(format), func(t *testing.T) {
			dir := t.TempDir()
			base, top := filepath.Join(dir, "base"), filepath.Join(dir, "top")
			const size = 1 << 20
			tool(t, "qemu-img", "create", "-q", "-f", string(format), base, fmt.Sprint(size))
			w := twin{c: openChain(t, base, Options{}), model: make([]byte, size)}
			put := func(at, n int, v byte) {
				t.Helper()
				b := bytes.Repeat([]byte{v}, n)
				copy(w.model[at:], b)
				if err := w.c.WriteAtv([][]byte{b}, int64(at)); err != nil {
					t.Fatal(err)
				}
			}
			put(0, 256<<10, 1)
			if err := errors.Join(w.c.CreateOverlay(top), w.c.Stack(top)); err != nil {
				t.Fatal(err)
			}
			put(64<<10, 4096, 2)
			if err := w.c.WriteZeroes(128<<10, 64<<10, true); err != nil {
				t.Fatal(err)
			}
			clear(w.model[128<<10 : 192<<10])
			layers := w.c.Layers()
			for _, want := range []struct {
				at    int64
				layer *Layer
				kind  qcow2.Kind
				value byte
			}{{0, layers[1], qcow2.Data, 1}, {64 << 10, layers[0], qcow2.Data, 2}, {68 << 10, layers[0], qcow2.Data, 1}, {128 << 10, layers[0], qcow2.Zero, 0}, {192 << 10, layers[1], qcow2.Data, 1}} {
				e, err := w.c.Map(want.at, 4096)
				if err != nil || e.Layer != want.layer || e.Kind != want.kind || e.Length != 4096 {
					t.Errorf("block at %#x is %+v, %v", want.at, e, err)
					continue
				}
				b := make([]byte, 4096)
				if _, err := e.Layer.ReadAt(b, want.at); err != nil || b[0] != want.value {
					t.Errorf("block at %#x reads %d, %v", want.at, b[0], err)
				}
				if e.Kind == qcow2.Data {
					if err := e.Layer.File().ReadBuffered(b, e.Host); err != nil || b[0] != want.value {
						t.Errorf("file of the block at %#x reads %d, %v", want.at, b[0], err)
					}
				}
			}
			// The frozen layer: readable by others, not writable.
			tool(t, "qemu-io", "-r", "-f", string(format), "-c", "read -P 1 64k 4k", base)
			if out, _ := status(t, "qemu-io", "-f", string(format), "-c", "write 0 4k", base); !bytes.Contains([]byte(out), []byte("lock")) {
				t.Errorf("the frozen layer could be written: %s", out)
			}
			if err := w.c.Unstack(); err != nil {
				t.Fatal(err)
			}
			put(512<<10, 100<<10, 3)
			w.compare(t)
		})
	}
}

// TestStackRefuses overlays that do not belong on the disk.
func TestStackRefuses(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	for _, name := range []string{"base", "other"} {
		tool(t, "qemu-img", "create", "-q", "-f", "qcow2", at(name), "1M")
	}
	if err := errors.Join(CreateOverlay(at("of-other"), at("other"), Qcow2, 1<<20), CreateOverlay(at("long"), at("base"), Qcow2, 2<<20),
		CreateOverlay(at("as-raw"), at("base"), Raw, 1<<20)); err != nil {
		t.Fatal(err)
	}
	c := openChain(t, at("base"), Options{})
	for _, name := range []string{"of-other", "long", "as-raw", "other", "missing", "base"} {
		var e *disk.Error
		if err := c.Stack(at(name)); !errors.As(err, &e) || e.Path == "" || e.Cure == "" {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := c.WriteAtv([][]byte{make([]byte, 512)}, 0); err != nil {
		t.Errorf("the disk cannot be written afterwards: %v", err)
	}
	if err := c.Close(); err != nil {
		t.Error(err)
	}
	if err := CreateOverlay(at("base"), at("other"), Qcow2, 1<<20); err == nil {
		t.Error("an image was overwritten")
	}
}

// TestDisguise: a guest cannot turn a raw disk into an overlay of any file.
func TestDisguise(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	sector := append([]byte(qcow2.Magic), make([]byte, 508)...)
	for _, format := range []Format{Probe, Raw} {
		c := openChain(t, path, Options{Format: format})
		q := newQueue(t, c)
		q.Write(0, [][]byte{sector[:2], sector[2:]}, 0, false)
		q.Submit()
		_, err := wait(q)
		sync := c.WriteAtv([][]byte{sector}, 0)
		if refused := format == Probe; (err != nil) != refused || (sync != nil) != refused {
			t.Errorf("format %q: %v, %v", format, err, sync)
		}
		if err := errors.Join(q.Close(), c.Close()); err != nil {
			t.Error(err)
		}
	}
}
