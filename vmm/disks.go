package vmm

import (
	"errors"
	"fmt"
	"math"

	"ditto.vm/devices/virtio/blk"
	"ditto.vm/images/chain"
	"ditto.vm/images/disk"
	"ditto.vm/vmm/api"
	"ditto.vm/vmm/config"
	"ditto.vm/vmm/naming"
)

// vmDisk is a disk of the machine.
type vmDisk struct {
	image    *chain.Chain
	dev      *blk.Device
	observer *naming.DiskObserver // nil when names are switched off
	writes   *writeWatch          // for who copies the disk
}

// resize changes image and device, in the order in which the guest never sees a
// part that is not there.
func (d vmDisk) resize(size int64) error {
	old := d.dev.Size()
	if size > old {
		if err := d.image.Resize(size); err != nil {
			return err
		}
		return d.dev.Resize(size)
	}
	if err := d.dev.Resize(size); err != nil {
		return err
	}
	if err := d.image.Resize(size); err != nil {
		return errors.Join(err, d.dev.Resize(old))
	}
	return nil
}

// ResizeDisk changes the size of the nth disk and tells the guest. What is behind
// the new end of a smaller disk is lost.
func (m *VM) ResizeDisk(n int, bytes uint64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	switch {
	case m.closed || m.state == api.Stopped:
		return fmt.Errorf("resize disk %d: VM is %s: %w", n, m.state, api.ErrWrongState)
	case m.saving:
		return fmt.Errorf("resize disk %d: the VM is being saved or migrated: %w", n, api.ErrWrongState)
	case m.away:
		return fmt.Errorf("resize disk %d: %w", n, errAway)
	case n < 0 || n >= len(m.disks):
		return fmt.Errorf("no disk %d: %w", n, api.ErrNotSupported)
	}
	if block := uint64(m.disks[n].image.BlockSize()); bytes == 0 || bytes > math.MaxInt64 || bytes%block != 0 {
		return api.Mistake(fmt.Errorf("disk %d cannot have %d bytes: use a multiple of %d", n, bytes, block))
	}
	err := m.disks[n].resize(int64(bytes))
	var mistake *disk.Error
	if errors.As(err, &mistake) {
		return api.Mistake(err)
	}
	return err
}

// addDisk opens a disk image and what it is stacked on, takes their locks and puts it on the bus.
func (m *VM) addDisk(i int, d config.Disk) error {
	image, err := chain.Open(d.Path, chain.Options{ReadOnly: d.ReadOnly, Cache: d.Cache, Format: d.Format})
	if err != nil {
		return err // it names the disk
	}
	m.cleanup.add(image.Close)
	queues := d.QueueCount(m.cfg.CPUs)
	writes := &writeWatch{}
	var names *naming.DiskObserver
	if m.naming != nil {
		if names, err = m.naming.AddDisk(image); err != nil {
			return err
		}
		writes.next = names
	}
	dev, err := blk.New(blk.Config{
		Size:         image.Size(),
		BlockSize:    image.BlockSize(),
		ReadOnly:     image.ReadOnly(),
		Serial:       d.Serial,
		Queues:       queues,
		Writethrough: image.Cache() == disk.CacheWritethrough,
		NewIOQueue:   func(depth int) (blk.IOQueue, error) { return image.NewQueue(depth) },
		Observer:     writes,
	})
	if err != nil {
		return fmt.Errorf("disk %s: %w", d.Path, err)
	}
	m.cleanup.add(dev.Close)
	m.disks = append(m.disks, vmDisk{image, dev, names, writes})
	info := api.Device{Name: fmt.Sprintf("blk%d", i), Backend: d.Path}
	return m.addVirtio(dev, info, queues, func(counters map[string]uint64) {
		s := dev.Stats()
		counters["size_bytes"] = uint64(dev.Size())
		counters["reads"], counters["read_bytes"] = s.Reads, s.ReadBytes
		counters["writes"], counters["write_bytes"] = s.Writes, s.WriteBytes
		counters["flushes"], counters["erases"], counters["errors"] = s.Flushes, s.Erases, s.Errors
	})
}
