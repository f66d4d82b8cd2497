package vmm

import (
	"fmt"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/disk"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/naming"
)

// diskReader reads from an image what a guest would read. It implements
// io.ReaderAt.
type diskReader struct{ disk.Image }

// ReadAt fills p or fails.
func (r diskReader) ReadAt(p []byte, offset int64) (int, error) {
	if err := r.ReadAtv([][]byte{p}, offset); err != nil {
		return 0, err
	}
	return len(p), nil
}

// addDisk opens a disk image, takes its lock and puts it on the bus.
func (m *VM) addDisk(i int, d config.Disk) error {
	image, err := disk.Open(d.Path, disk.Options{ReadOnly: d.ReadOnly, Cache: d.Cache})
	if err != nil {
		return err // it names the disk
	}
	m.cleanup.add(image.Close)
	queues := d.QueueCount(m.cfg.CPUs)
	var observer blk.Observer
	if m.naming != nil {
		observer, err = m.naming.AddDisk(naming.Disk{
			Path: d.Path, Source: diskReader{image}, Size: image.Size(), Immutable: image.ReadOnly(),
		})
		if err != nil {
			return err
		}
	}
	dev, err := blk.New(blk.Config{
		Size:         image.Size(),
		BlockSize:    image.BlockSize(),
		ReadOnly:     image.ReadOnly(),
		Serial:       d.Serial,
		Queues:       queues,
		Writethrough: image.Cache() == disk.CacheWritethrough,
		NewIOQueue:   func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
		Observer:     observer,
	})
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.Path, err)
	}
	m.cleanup.add(dev.Close)
	info := api.Device{Name: fmt.Sprintf("blk%d", i), Backend: d.Path}
	return m.addVirtio(dev, info, queues, func(counters map[string]uint64) {
		s := dev.Stats()
		counters["reads"], counters["read_bytes"] = s.Reads, s.ReadBytes
		counters["writes"], counters["write_bytes"] = s.Writes, s.WriteBytes
		counters["flushes"], counters["erases"], counters["errors"] = s.Flushes, s.Erases, s.Errors
	})
}
