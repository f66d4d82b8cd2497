package balloon

import (
	"encoding/binary"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"ditto.vm/devices/virtio"
	"ditto.vm/memory"
)

// PageSize is the unit of the balloon in bytes, whatever the guest's and the
// host's page sizes are (virtio 1.2 5.5.6).
const PageSize = 4096

// Queues (virtio 1.2 5.5.2). Without free page hints, which are not offered,
// the specification still gives reporting queue 4, while Linux long left out
// queues that it does not use and took 3. Both serve reports.
const (
	inflateQueue = iota
	deflateQueue
	statsQueue
	oldReportingQueue
	reportingQueue
	numQueues

	queueSize = 128
)

// Feature bits (virtio 1.2 5.5.3).
const (
	featureStats     uint64 = 1 << 1
	featureDeflate   uint64 = 1 << 2 // on out of memory
	featureReporting uint64 = 1 << 5
)

// Layout of struct virtio_balloon_config (virtio 1.2 5.5.4).
const (
	configNumPages = 0
	configActual   = 4
	configSize     = 16
)

// Device is a virtio balloon. It implements [virtio.Device].
type Device struct {
	features uint64 // what the driver is offered
	holder   Holder // may be nil

	timer int // timerfd: ask for statistics
	run   *run

	// reclaimed counts the bytes that were given back to the host.
	reclaimed atomic.Uint64

	mu            sync.Mutex
	closed        bool
	target        uint32 // pages that the host wants
	actual        uint32 // pages that the driver says it gave
	interval      time.Duration
	stats         Stats
	configChanged func() // while started
}

// Config is what the driver is offered.
type Config struct {
	// DeflateOnOOM lets the driver take pages back rather than let the guest
	// run out of memory.
	DeflateOnOOM bool
	// FreePageReporting lets the driver report pages that the guest freed.
	FreePageReporting bool
	// Holder hears which pages the balloon holds; nil for nobody.
	Holder Holder
}

// Holder hears which pages the balloon holds. What free page reports give back
// is not among them: the guest takes it again without a word. Calls come one at
// a time and must not block. Ranges are whole pages and may lie outside RAM,
// where they mean nothing.
type Holder interface {
	// Hold is called before the pages of r are given back to the host.
	Hold(r memory.Range)
	// Release is called when the driver takes the pages of r out of the
	// balloon, whether or not they were in it.
	Release(r memory.Range)
	// ReleaseAll is called when the driver is reset: it has taken all back.
	ReleaseAll()
}

// New makes a device without a target.
func New(config Config) (*Device, error) {
	timer, err := unix.TimerfdCreate(unix.CLOCK_MONOTONIC, unix.TFD_CLOEXEC|unix.TFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("virtio balloon: timerfd: %w", err)
	}
	features := uint64(featureStats)
	if config.DeflateOnOOM {
		features |= featureDeflate
	}
	if config.FreePageReporting {
		features |= featureReporting
	}
	return &Device{timer: timer, features: features, holder: config.Holder}, nil
}

// Close gives back what the device holds. It must be stopped.
func (d *Device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	d.closed = true
	return unix.Close(d.timer)
}

// SetTarget asks the driver to keep so many bytes in the balloon, rounded down
// to pages. The driver follows as far as it can; see [Device.Actual].
func (d *Device) SetTarget(bytes uint64) {
	pages := uint32(min(bytes/PageSize, 1<<32-1))
	d.mu.Lock()
	tell := d.configChanged
	if pages == d.target {
		tell = nil
	}
	d.target = pages
	d.mu.Unlock()
	if tell != nil {
		tell()
	}
}

// Target returns the bytes that the driver is asked to keep in the balloon.
func (d *Device) Target() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint64(d.target) * PageSize
}

// Actual returns the bytes that the driver says are in the balloon.
func (d *Device) Actual() uint64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	return uint64(d.actual) * PageSize
}

// Reclaimed returns how many bytes inflating and free page reports have given
// back to the host so far. The guest takes pages back without a word, so it
// only grows.
func (d *Device) Reclaimed() uint64 { return d.reclaimed.Load() }

// ID implements [virtio.Device].
func (d *Device) ID() virtio.ID { return virtio.IDBalloon }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 {
	return []uint16{queueSize, queueSize, queueSize, queueSize, queueSize}
}

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(offset uint64, data []byte) {
	config := d.config()
	clear(data)
	if offset < configSize {
		copy(data, config[offset:])
	}
}

// WriteConfig implements [virtio.Device]: the driver says how large the
// balloon is.
func (d *Device) WriteConfig(offset uint64, data []byte) {
	if offset >= configSize {
		return
	}
	config := d.config()
	copy(config[offset:], data)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.actual = binary.LittleEndian.Uint32(config[configActual:])
}

// config returns the configuration structure. free_page_hint_cmd_id and
// poison_val belong to features that are not offered and stay zero.
func (d *Device) config() (c [configSize]byte) {
	d.mu.Lock()
	defer d.mu.Unlock()
	binary.LittleEndian.PutUint32(c[configNumPages:], d.target)
	binary.LittleEndian.PutUint32(c[configActual:], d.actual)
	return c
}

// Start implements [virtio.Device].
func (d *Device) Start(a virtio.Activation) error {
	r, err := newRun(a, d)
	if err != nil {
		return err
	}
	d.run = r
	d.mu.Lock()
	defer d.mu.Unlock()
	d.configChanged = a.ConfigChanged
	return nil
}

// Stop implements [virtio.Device]. A driver that is reset has taken its pages
// back.
func (d *Device) Stop() {
	d.mu.Lock()
	d.configChanged = nil
	d.mu.Unlock()
	d.run.worker.Stop()
	d.run = nil
	if d.holder != nil {
		d.holder.ReleaseAll()
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.actual = 0
}

// Pause implements [virtio.Device].
func (d *Device) Pause() { d.run.worker.Pause() }

// Resume implements [virtio.Device].
func (d *Device) Resume() { d.run.worker.Resume() }
