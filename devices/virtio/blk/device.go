package blk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"ditto.vm/devices/virtio"
)

// Feature bits of the block device (virtio 1.2 5.2.3).
const (
	FeatureSizeMax     = 1 << 1
	FeatureSegMax      = 1 << 2
	FeatureReadOnly    = 1 << 5
	FeatureBlockSize   = 1 << 6
	FeatureFlush       = 1 << 9
	FeatureTopology    = 1 << 10
	FeatureConfigWCE   = 1 << 11
	FeatureMultiqueue  = 1 << 12
	FeatureDiscard     = 1 << 13
	FeatureWriteZeroes = 1 << 14
)

// IOQueue does the I/O of one virtqueue without waiting. The queues of package
// images/disk are of this kind.
type IOQueue interface {
	// FDs become readable when requests complete, edge by edge.
	FDs() []int
	Read(token int, bufs [][]byte, offset int64)
	// Write completes when the data are stable if sync is set.
	Write(token int, bufs [][]byte, offset int64, sync bool)
	// Flush makes stable what completed before.
	Flush(token int)
	Discard(token int, offset, n int64)
	WriteZeroes(token int, offset, n int64, unmap bool)
	// Submit starts what was asked for since the last Submit.
	Submit()
	// Completed returns a request that completed, if there is one.
	Completed() (token int, err error, ok bool)
	// Wait returns when Completed may have one; something is in flight.
	Wait()
	Close() error
}

// Config describes a disk to the guest.
type Config struct {
	// Size is the length of the disk in bytes, a multiple of BlockSize.
	Size int64
	// BlockSize is the logical block size, 512 if 0.
	BlockSize int
	// PhysicalBlockSize is what the guest should align to, 4096 if 0.
	PhysicalBlockSize int
	ReadOnly          bool
	// Serial is what the guest reads as the serial number, up to 20 bytes.
	Serial string
	// Queues is the number of virtqueues, 1 if 0; one per vCPU is best.
	Queues int
	// QueueSize is the length of each, 256 if 0.
	QueueSize int
	// Writethrough starts the disk with its write cache off: a write is
	// stable when it completes. A driver may switch the cache on.
	Writethrough bool
	// NewIOQueue makes the I/O queue behind one virtqueue, for depth
	// requests. It is called in New; the device closes what it returns.
	NewIOQueue func(depth int) (IOQueue, error)
	// Observer hears of I/O that names pages; nil for none.
	Observer Observer
}

// Defaults and limits of a Config.
const (
	defaultQueueSize = 256
	defaultPhysical  = 4096
	maxQueues        = 256
	// maxEraseSectors bounds one discard or write-zeroes to 1 GiB, so that
	// no thread of the I/O queue is gone for long.
	maxEraseSectors = 1 << 30 / sectorSize
)

// Device is a virtio block device. It implements virtio.Device.
type Device struct {
	config   Config
	features uint64
	image    [configSize]byte // of the configuration space, but capacity and writeback

	size      atomic.Int64 // bytes
	writeback atomic.Bool  // the write cache is on
	queues    []*queue

	lifecycle     sync.Mutex // orders what starts, stops and parks the workers
	work          work
	configChanged func() // unless stopped

	stats   counters
	mu      sync.Mutex // guards what follows
	nextLog time.Time
	skipped int
}

// work is what the queues' workers do.
type work int

const (
	stopped work = iota
	running
	paused
)

// New makes a disk. The I/O queues are made here, before the process gives up
// the right to; Close frees them.
func New(config Config) (*Device, error) {
	if err := config.complete(); err != nil {
		return nil, fmt.Errorf("virtio-blk: %w", err)
	}
	d := &Device{config: config, features: config.features()}
	d.image = config.space(d.features)
	d.size.Store(config.Size)
	d.writeback.Store(!config.Writethrough)
	for i := range config.Queues {
		io, err := config.NewIOQueue(config.QueueSize)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("virtio-blk: I/O queue %d: %w", i, err), d.Close())
		}
		d.queues = append(d.queues, newQueue(d, io))
	}
	return d, nil
}

// complete fills in defaults and checks the rest.
func (c *Config) complete() error {
	if c.BlockSize == 0 {
		c.BlockSize = sectorSize
	}
	if c.PhysicalBlockSize == 0 {
		c.PhysicalBlockSize = max(defaultPhysical, c.BlockSize)
	}
	if c.Queues == 0 {
		c.Queues = 1
	}
	if c.QueueSize == 0 {
		c.QueueSize = defaultQueueSize
	}
	switch {
	case !powerOfTwo(c.BlockSize) || c.BlockSize < sectorSize || c.BlockSize > 64<<10:
		return fmt.Errorf("block size %d", c.BlockSize)
	case !powerOfTwo(c.PhysicalBlockSize) || c.PhysicalBlockSize < c.BlockSize:
		return fmt.Errorf("physical block size %d with blocks of %d", c.PhysicalBlockSize, c.BlockSize)
	case !c.fits(c.Size):
		return fmt.Errorf("size %d is not a positive multiple of %d", c.Size, c.BlockSize)
	case c.Queues < 1 || c.Queues > maxQueues:
		return fmt.Errorf("%d queues, the most is %d", c.Queues, maxQueues)
	case !powerOfTwo(c.QueueSize) || c.QueueSize < 4 || c.QueueSize > virtio.MaxQueueSize:
		return fmt.Errorf("queue size %d", c.QueueSize)
	case len(c.Serial) > serialSize:
		return fmt.Errorf("serial number %q is longer than %d bytes", c.Serial, serialSize)
	case c.NewIOQueue == nil:
		return errors.New("no I/O queue")
	}
	return nil
}

// fits reports whether a disk can have the size.
func (c *Config) fits(size int64) bool { return size > 0 && size%int64(c.BlockSize) == 0 }

func powerOfTwo(n int) bool { return n > 0 && n&(n-1) == 0 }

func (c *Config) features() uint64 {
	f := uint64(FeatureSizeMax | FeatureSegMax | FeatureBlockSize | FeatureTopology |
		FeatureFlush | FeatureConfigWCE | FeatureMultiqueue)
	if c.ReadOnly {
		return f | FeatureReadOnly
	}
	return f | FeatureDiscard | FeatureWriteZeroes
}

// Close frees the I/O queues. The device must be stopped.
func (d *Device) Close() error {
	var errs []error
	for _, q := range d.queues {
		errs = append(errs, q.io.Close())
	}
	d.queues = nil
	return errors.Join(errs...)
}

// ID implements virtio.Device.
func (d *Device) ID() virtio.ID { return virtio.IDBlock }

// Features implements virtio.Device.
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements virtio.Device.
func (d *Device) QueueSizes() []uint16 {
	sizes := make([]uint16, d.config.Queues)
	for i := range sizes {
		sizes[i] = uint16(d.config.QueueSize)
	}
	return sizes
}

// ReadConfig implements virtio.Device.
func (d *Device) ReadConfig(offset uint64, data []byte) {
	clear(data)
	if offset >= configSize {
		return
	}
	image := d.image
	binary.LittleEndian.PutUint64(image[configCapacity:], uint64(d.size.Load()/sectorSize))
	if d.writeback.Load() {
		image[configWriteback] = 1
	}
	copy(data, image[offset:])
}

// WriteConfig implements virtio.Device: the driver may switch the write cache.
func (d *Device) WriteConfig(offset uint64, data []byte) {
	if offset <= configWriteback && configWriteback-offset < uint64(len(data)) {
		d.writeback.Store(data[configWriteback-offset]&1 != 0)
	}
}

// The configuration space (virtio 1.2 5.2.4).
const (
	configCapacity       = 0
	configSizeMax        = 8
	configSegMax         = 12
	configBlockSize      = 20
	configPhysicalExp    = 24
	configMinIO          = 26
	configOptIO          = 28
	configWriteback      = 32
	configNumQueues      = 34
	configDiscardSectors = 36
	configDiscardSegs    = 40
	configDiscardAlign   = 44
	configZeroSectors    = 48
	configZeroSegs       = 52
	configZeroUnmap      = 56
	configSize           = 60
)

// space lays out the configuration space.
func (c *Config) space(features uint64) (image [configSize]byte) {
	le := binary.LittleEndian
	// Header and status take a descriptor each.
	segments := c.QueueSize - 2
	le.PutUint32(image[configSegMax:], uint32(segments))
	// The longest request that the driver may build is one that the queue
	// accepts: segments of this size, with header and status.
	le.PutUint32(image[configSizeMax:], uint32((virtio.MaxChainBytes-defaultPhysical)/segments)&^(defaultPhysical-1))
	le.PutUint32(image[configBlockSize:], uint32(c.BlockSize))
	blocks := c.PhysicalBlockSize / c.BlockSize
	for blocks>>image[configPhysicalExp] > 1 {
		image[configPhysicalExp]++
	}
	le.PutUint16(image[configMinIO:], uint16(blocks))
	le.PutUint32(image[configOptIO:], 0)
	le.PutUint16(image[configNumQueues:], uint16(c.Queues))
	if features&FeatureDiscard != 0 {
		le.PutUint32(image[configDiscardSectors:], maxEraseSectors)
		le.PutUint32(image[configDiscardSegs:], 1)
		le.PutUint32(image[configDiscardAlign:], uint32(c.PhysicalBlockSize/sectorSize))
		le.PutUint32(image[configZeroSectors:], maxEraseSectors)
		le.PutUint32(image[configZeroSegs:], 1)
		image[configZeroUnmap] = 1
	}
	return image
}

// Start implements virtio.Device.
func (d *Device) Start(a virtio.Activation) error {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	// A driver that cannot flush has a disk without a write cache; one that
	// cannot switch the cache has it as the disk was configured (virtio 1.2
	// 5.2.5.2).
	if !a.Has(FeatureFlush | FeatureConfigWCE) {
		d.writeback.Store(a.Has(FeatureFlush) && !d.config.Writethrough)
	}
	for i, q := range d.queues {
		if err := q.start(a, a.Queues[i]); err != nil {
			for _, started := range d.queues[:i] {
				started.stop()
			}
			return err
		}
	}
	d.work, d.configChanged = running, a.ConfigChanged
	return nil
}

// Stop implements virtio.Device.
func (d *Device) Stop() {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.work, d.configChanged = stopped, nil
	for _, q := range d.queues {
		q.stop()
	}
	d.writeback.Store(!d.config.Writethrough)
}

// Pause implements virtio.Device.
func (d *Device) Pause() {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.park()
	d.work = paused
}

// park lets every worker finish what is in flight and stand still.
func (d *Device) park() {
	for _, q := range d.queues {
		q.pause()
	}
}

// Resume implements virtio.Device.
func (d *Device) Resume() {
	d.lifecycle.Lock()
	defer d.lifecycle.Unlock()
	d.unpark()
	d.work = running
}

// unpark lets every worker go on.
func (d *Device) unpark() {
	for _, q := range d.queues {
		q.resume()
	}
}

// logInterval is how often failures of the disk are logged at most.
const logInterval = 5 * time.Second

// failed logs a failure of the disk, now and then.
func (d *Device) failed(q *queue, r request, err error) {
	d.stats.errors.Add(1)
	d.mu.Lock()
	now := time.Now()
	log, skipped := !now.Before(d.nextLog), d.skipped
	if log {
		d.nextLog, d.skipped = now.Add(logInterval), 0
	} else {
		d.skipped++
	}
	d.mu.Unlock()
	if log {
		q.activation.Log.Warn("disk request failed", "request", r.String(), "err", err, "queue", q.ring.Index(), "unlogged", skipped)
	}
}
