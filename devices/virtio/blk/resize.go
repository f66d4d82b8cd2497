package blk

import "fmt"

// Size returns the length of the disk in bytes.
func (d *Device) Size() int64 { return d.size.Load() }

// Resize changes the length of the disk and tells the driver. What is in flight
// completes first: afterwards no request reaches beyond the new end, and the
// observer has forgotten the blocks there. So an image grows before, and shrinks
// after.
func (d *Device) Resize(size int64) error {
	if !d.config.fits(size) {
		return fmt.Errorf("virtio-blk: size %d is not a positive multiple of %d", size, d.config.BlockSize)
	}
	if tell := d.resize(size); tell != nil {
		tell()
	}
	return nil
}

// resize returns how to tell the driver, nil if it need not be told.
func (d *Device) resize(size int64) (tell func()) {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	if size == d.size.Load() {
		return nil
	}
	if d.work == running {
		d.park()
		defer d.unpark()
	}
	d.size.Store(size)
	for _, q := range d.queues {
		q.geometry.size = size
	}
	if d.config.Observer != nil {
		d.config.Observer.Resize(size)
	}
	return d.configChanged
}
