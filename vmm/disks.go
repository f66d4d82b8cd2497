package vmm

import (
	"fmt"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/disk"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
)

// addDisk opens a disk image, takes its lock and puts it on the bus.
func (m *VM) addDisk(i int, d config.Disk) error {
	image, err := disk.Open(d.Path, disk.Options{ReadOnly: d.ReadOnly, Cache: d.Cache})
	if err != nil {
		return err // it names the disk
	}
	m.cleanup.add(image.Close)
	queues := d.QueueCount(m.cfg.CPUs)
	dev, err := blk.New(blk.Config{
		Size:         image.Size(),
		BlockSize:    image.BlockSize(),
		ReadOnly:     image.ReadOnly(),
		Serial:       d.Serial,
		Queues:       queues,
		Writethrough: image.Cache() == disk.CacheWritethrough,
		NewIOQueue:   func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
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
