package naming

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/blk"
	"ditto.vm/guest/boot"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/index"
	"ditto.vm/images/layer"
	"ditto.vm/memory"
	"ditto.vm/memory/names"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// logBuffer is written by the prover and read by the test.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// rig is a Naming over 16 MiB of memory.
type rig struct {
	*Naming
	space *memory.Space
	log   logBuffer
}

func newRig(t *testing.T, kind memory.TrackerKind) *rig {
	t.Helper()
	r := &rig{}
	var err error
	if r.space, err = memory.New(memory.Config{Size: 16 << 20}); err != nil {
		t.Fatal(err)
	}
	tracker, _, err := memory.OpenTracker(r.space, kind, memory.TrackerHost{})
	if errors.Is(err, memory.ErrUnsupported) {
		r.space.Close()
		t.Skipf("%v; try: a kernel of 6.7 or newer that allows userfaultfd", err)
	}
	if err != nil {
		t.Fatal(err)
	}
	frames, err := memory.NewFrames(r.space, tracker)
	if err != nil {
		t.Fatal(err)
	}
	policy := names.DefaultProverPolicy()
	policy.Interval, policy.Quiet, policy.Read = time.Millisecond, 0, 1<<30
	r.Naming = New(r.space, tracker, frames, slog.New(slog.NewTextHandler(&r.log, nil)), Options{Policy: policy})
	t.Cleanup(func() {
		r.space.SetObserver(nil)
		if err := errors.Join(r.Close(), frames.Close(), tracker.Close(), r.space.Close()); err != nil {
			t.Error(err)
		}
	})
	return r
}

func (r *rig) view(t *testing.T, gfn memory.GFN) []byte {
	t.Helper()
	b, err := r.space.View(gfn.GPA(), memory.PageSize)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// add opens an image until the end of the test and makes it a disk.
func (r *rig) add(t *testing.T, path string, o chain.Options) *DiskObserver {
	t.Helper()
	if o.Format == chain.Probe {
		o.Format = chain.Raw
	}
	c, err := chain.Open(path, o)
	must(t, err)
	t.Cleanup(func() { must(t, c.Close()) })
	d, err := r.AddDisk(c)
	must(t, err)
	return d
}

// image writes an image of n random blocks.
func image(t *testing.T, n int) (path string, content []byte) {
	t.Helper()
	content = make([]byte, n*names.BlockSize)
	rng := rand.NewChaCha8([32]byte{byte(n)})
	rng.Read(content)
	path = filepath.Join(t.TempDir(), "disk.img")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path, content
}

func buildIndex(t *testing.T, path, at string) {
	t.Helper()
	src, err := layer.OpenFile(path)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	if _, err := index.Build(t.Context(), src, at, index.Options{}); err != nil {
		t.Fatal(err)
	}
}

// request makes an IO over single pages.
func (r *rig) request(t *testing.T, block int64, gfns ...memory.GFN) *blk.IO {
	io := &blk.IO{Offset: block * names.BlockSize}
	for _, gfn := range gfns {
		io.Buffers = append(io.Buffers, virtio.Buffer{GPA: gfn.GPA(), Data: r.view(t, gfn)})
	}
	return io
}

// read does a request as a device does.
func (r *rig) read(t *testing.T, o blk.Observer, content []byte, block int64, gfns ...memory.GFN) {
	t.Helper()
	io := r.request(t, block, gfns...)
	o.BeforeRead(io)
	for i, b := range io.Buffers {
		copy(b.Data, content[(int(block)+i)*names.BlockSize:])
		r.space.Wrote(b.GPA, uint64(len(b.Data)))
	}
	o.AfterRead(io, nil)
}

func TestObserver(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	path, content := image(t, 300)
	o := r.add(t, path, chain.Options{})
	// More buffers than one batch holds.
	var gfns []memory.GFN
	for i := range memory.GFN(100) {
		gfns = append(gfns, 3*i+5)
	}
	r.read(t, o, content, 20, gfns...)
	for i, gfn := range gfns {
		if got, want := r.Table().At(gfn), names.OfBlock(o.Layer(), uint64(20+i)); got != want {
			t.Errorf("page %s is %s, want %s", gfn, got, want)
		}
	}
	if n := r.Table().Stats().Recorded; n != 100 {
		t.Errorf("%d pages were recorded", n)
	}

	// A page that stands in two batches.
	twice := r.request(t, 150, gfns...)
	twice.Buffers[90] = twice.Buffers[3]
	o.BeforeRead(twice)
	o.AfterRead(twice, nil)
	if got := r.Table().At(gfns[3]); got != 0 {
		t.Errorf("a page that stands twice in a request is %s", got)
	}
	if got := r.Table().At(gfns[4]); got != names.OfBlock(o.Layer(), 154) {
		t.Errorf("the page beside it is %s", got)
	}

	write := r.request(t, 200, gfns...)
	o.BeforeWrite(write)
	if got := r.Table().At(gfns[4]); got != 0 {
		t.Errorf("a page that is being written is %s", got)
	}
	o.AfterWrite(write, nil)
	if got := r.Table().At(gfns[99]); got != names.OfBlock(o.Layer(), 299) {
		t.Errorf("a written page is %s", got)
	}
	o.BeforeWrite(write)
	o.AfterWrite(write, errors.New("the disk is broken"))
	o.BeforeErase(0, 0)
	o.AfterErase(0, 0, nil)
	o.BeforeErase(0, 10*names.BlockSize)
	o.AfterErase(0, 10*names.BlockSize, nil)
	o.Resize(250 * names.BlockSize)
	if n := r.Table().Stats().Named; n != 0 {
		t.Errorf("%d pages are named after a write that failed", n)
	}
}

func TestObserverAllocatesNothing(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	path, _ := image(t, 300)
	o := r.add(t, path, chain.Options{})
	var gfns []memory.GFN
	for i := range memory.GFN(100) {
		gfns = append(gfns, 3*i+5)
	}
	io := r.request(t, 20, gfns...)
	if n := testing.AllocsPerRun(100, func() {
		o.BeforeRead(io)
		o.AfterRead(io, nil)
		o.BeforeWrite(io)
		o.AfterWrite(io, nil)
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// TestProves runs the prover over a real image, with and without the host's
// page cache.
func TestProves(t *testing.T) {
	for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone} {
		t.Run(cache.String(), func(t *testing.T) {
			r := newRig(t, memory.TrackerWPAsync)
			path, content := image(t, 300)
			if c, err := chain.Open(path, chain.Options{Cache: cache, Format: chain.Raw}); err != nil {
				t.Skipf("%v; try: TMPDIR on a file system with O_DIRECT", err)
			} else {
				must(t, c.Close())
			}
			o := r.add(t, path, chain.Options{Cache: cache})
			r.Start()
			r.Start() // twice is once
			for i := range memory.GFN(100) {
				r.read(t, o, content, int64(i), 2*i)
			}
			for r.Stats().NamedProven < 100 {
				time.Sleep(time.Millisecond)
			}
			r.Stop()
			r.Stop()
			r.view(t, 20)[9]++
			if err := r.Settle(context.Background()); err != nil {
				t.Fatal(err)
			}
			if got := r.Table().At(20); got != 0 {
				t.Errorf("a written page is %s", got)
			}
			for i := range memory.GFN(100) {
				n := r.Table().At(2 * i)
				if i != 10 && (!n.Proven() || n.Number() != uint64(i)) {
					t.Errorf("page %s is %s, proven %t", 2*i, n, n.Proven())
				}
			}
		})
	}
}

func TestLoaded(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	path, _ := image(t, 50)
	kernel, err := boot.OpenImage(path)
	if err != nil {
		t.Fatal(err)
	}
	defer kernel.Close()
	if err := r.AddFile(boot.SourceKernel, kernel); err != nil {
		t.Fatal(err)
	}
	segments := []boot.FileRange{
		{Source: boot.SourceKernel, GPA: 0x10000, Offset: 0x1000, Size: 0x2800},
		{Source: boot.SourceKernel, GPA: 0x20200, Offset: 0x3200, Size: 0x3000},
		{Source: boot.SourceKernel, GPA: 0x30000, Offset: 0x3200, Size: 0x3000}, // never aligned
		{Source: boot.SourceKernel, GPA: 0x40100, Offset: 0x4100, Size: 0x200},  // within a page
		{Source: boot.SourceInitrd, GPA: 0x50000, Offset: 0, Size: 0x1000},      // no such file
	}
	want := map[memory.GFN]uint64{0x10: 1, 0x11: 2, 0x21: 4, 0x22: 5}
	for range 2 { // again after a restart
		if err := r.space.Clear(); err != nil {
			t.Fatal(err)
		}
		if n := r.Stats().Named; n != 0 {
			t.Fatalf("%d names survived the restart", n)
		}
		r.Loaded(segments)
		for gfn := range memory.GFN(0x60) {
			name := names.Name(0)
			if block, ok := want[gfn]; ok {
				name = names.OfBlock(0, block)
			}
			if got := r.Table().At(gfn); got != name {
				t.Errorf("page %s is %s, want %s", gfn, got, name)
			}
		}
	}
}

// TestSettleWithoutTracker keeps provisional names.
func TestSettleWithoutTracker(t *testing.T) {
	r := newRig(t, memory.TrackerNone)
	path, content := image(t, 64)
	o := r.add(t, path, chain.Options{})
	r.read(t, o, content, 7, 100)
	r.Start()
	must(t, r.Settle(t.Context()))
	r.Stop()
	if got := r.Table().At(100); got != names.OfBlock(o.Layer(), 7) || r.Proves() {
		t.Errorf("page is %s, proves %t", got, r.Proves())
	}
	if got := fmt.Sprint(r.Tracker().Kind()); got != "none" {
		t.Errorf("tracker is %s", got)
	}
}
