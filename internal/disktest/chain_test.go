package disktest

import (
	"bytes"
	"errors"
	"math/rand"
	"path/filepath"
	"testing"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/images/qcow2"
)

// newChain makes an empty qcow2 disk of n bytes and a block device over it.
func newChain(tb testing.TB, n int64, o chain.Options, queues int) (*blk.Device, *chain.Chain) {
	tb.Helper()
	path := filepath.Join(tb.TempDir(), "disk.qcow2")
	if err := qcow2.Create(path, qcow2.CreateOptions{Size: n}); err != nil {
		tb.Fatal(err)
	}
	image, err := chain.Open(path, o)
	if err != nil {
		tb.Fatal(err)
	}
	device, err := blk.New(blk.Config{
		Size: image.Size(), BlockSize: image.BlockSize(), Queues: queues,
		Writethrough: o.Cache == disk.CacheWritethrough,
		NewIOQueue:   func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
	})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := errors.Join(device.Close(), image.Close()); err != nil {
			tb.Error(err)
		}
	})
	return device, image
}

// TestChain drives a qcow2 disk like a raw one, in every cache mode, and
// stacks overlays on it while its device is paused.
func TestChain(t *testing.T) {
	for _, cache := range []disk.Cache{disk.CacheWriteback, disk.CacheNone, disk.CacheWritethrough} {
		t.Run(cache.String(), func(t *testing.T) {
			const size, lanes = 4 << 20, 16
			device, image := newChain(t, size, chain.Options{Cache: cache}, 2)
			d := virtiotest.NewDriver(t, device)
			d.Start(allFeatures, 128)
			rng := rand.New(rand.NewSource(int64(cache)))
			model := make([]byte, size)
			for depth := range 3 {
				for range 10 {
					round(t, d, rng, model, lanes)
				}
				d.Function.Pause()
				overlay := image.Path() + string(rune('a'+depth))
				if err := errors.Join(image.CreateOverlay(overlay), image.Stack(overlay)); err != nil {
					t.Fatal(err)
				}
				if err := d.Function.Resume(); err != nil {
					t.Fatal(err)
				}
			}
			round(t, d, rng, model, lanes)
			d.Reset()
			got := make([]byte, size)
			if err := image.ReadAtv([][]byte{got}, 0); err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(got, model) {
				t.Error("disk and model differ")
			}
		})
	}
}
