package net

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"ditto.vm/devices/virtio"
)

// Queues (virtio 1.2 5.1.2).
const (
	receiveQueue = iota
	transmitQueue
	controlQueue
)

// Sizes of the rings. Half a thousand buffers hold several of the longest
// frames even when the driver posts them in pieces of 1.5 KiB.
const (
	queueSize        = 512
	controlQueueSize = 64
)

// Layout of struct virtio_net_config (virtio 1.2 5.1.4).
const (
	configMAC    = 0
	configStatus = 6
	configPairs  = 8
	configMTU    = 10
	configSize   = 12
)

// Bits of the status field.
const (
	statusLinkUp   = 1
	statusAnnounce = 2
)

// MTU limits in bytes (virtio 1.2 5.1.4.1).
const (
	MinMTU     = 68
	MaxMTU     = 65535
	defaultMTU = 1500
)

// Config is what the device is made from.
type Config struct {
	// Backend carries the frames; nil makes a device whose link is down.
	Backend Backend
	// MAC is the guest's address.
	MAC MAC
	// MTU in bytes that the guest is told, and the longest packet that the
	// backend delivers unless segments were negotiated. 0 tells the guest
	// nothing and means 1500.
	MTU int
}

// Device is a virtio network device. It implements [virtio.Device].
type Device struct {
	config   Config
	features uint64
	counters counters
	link     atomic.Bool // what LinkUp says
	run      *run        // while started; lifecycle calls only

	// The receiver's while started, see [receiver].
	filter   filter
	offloads uint64 // of the guest, in effect
	restored bool   // filter and offloads come from SetState

	mu            sync.Mutex
	mac           MAC
	linkUp        bool // as the VMM wants it
	dead          bool // the backend carries no frames any more
	announce      bool // the driver is asked to announce itself
	configChanged func()
	activation    *run // as run, for calls from other goroutines
}

// counters are what passed, by direction as the guest sees it.
type counters struct {
	receivedFrames, receivedBytes, receiveDropped atomic.Uint64
	sentFrames, sentBytes, sendDropped            atomic.Uint64
}

// Counters are what has passed since the device was made. Bytes are of frames
// without their virtio headers.
type Counters struct {
	ReceivedFrames, ReceivedBytes, ReceiveDropped uint64
	SentFrames, SentBytes, SendDropped            uint64
}

// New makes a device. The backend stays the caller's.
func New(config Config) (*Device, error) {
	if config.MAC.multicast() || config.MAC == (MAC{}) {
		return nil, fmt.Errorf("virtio net: %x is not a unicast address", config.MAC)
	}
	if config.MTU != 0 && (config.MTU < MinMTU || config.MTU > MaxMTU) {
		return nil, fmt.Errorf("virtio net: MTU %d: use %d to %d", config.MTU, MinMTU, MaxMTU)
	}
	d := &Device{config: config, features: ownFeatures, linkUp: config.Backend != nil}
	if config.MTU != 0 {
		d.features |= featureMTU
	}
	if config.Backend == nil {
		d.config.Backend = nowhere{}
	}
	backend := d.config.Backend.Offloads() & offloads
	d.features |= backend
	if backend&guestOffloads != 0 {
		d.features |= featureCtrlOffloads
	}
	d.link.Store(d.linkUp)
	d.reset()
	return d, nil
}

// reset puts what the driver can change back to how it was made.
func (d *Device) reset() {
	d.filter, d.offloads, d.restored = newFilter(), 0, false
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mac, d.announce = d.config.MAC, false
}

// ID implements [virtio.Device].
func (d *Device) ID() virtio.ID { return virtio.IDNet }

// Features implements [virtio.Device].
func (d *Device) Features() uint64 { return d.features }

// QueueSizes implements [virtio.Device].
func (d *Device) QueueSizes() []uint16 {
	return []uint16{receiveQueue: queueSize, transmitQueue: queueSize, controlQueue: controlQueueSize}
}

// ReadConfig implements [virtio.Device].
func (d *Device) ReadConfig(offset uint64, data []byte) {
	var config [configSize]byte
	d.mu.Lock()
	copy(config[configMAC:], d.mac[:])
	status := uint16(0)
	if d.up() {
		status |= statusLinkUp
	}
	if d.announce {
		status |= statusAnnounce
	}
	d.mu.Unlock()
	binary.LittleEndian.PutUint16(config[configStatus:], status)
	binary.LittleEndian.PutUint16(config[configPairs:], 1)
	binary.LittleEndian.PutUint16(config[configMTU:], uint16(d.config.MTU))
	clear(data)
	if offset < configSize {
		copy(data, config[offset:])
	}
}

// WriteConfig implements [virtio.Device]: a driver changes its address with
// the control queue.
func (d *Device) WriteConfig(uint64, []byte) {}

// up reports whether the link is up.
//
// Preconditions: mu is held.
func (d *Device) up() bool { return d.linkUp && !d.dead }

// LinkUp reports whether frames can pass: the VMM wants it and the backend's
// peer is there.
func (d *Device) LinkUp() bool { return d.link.Load() }

// SetLink plugs the cable in or out. Frames are dropped while it is out.
func (d *Device) SetLink(up bool) { d.changeLink(func() { d.linkUp = up }) }

// lost takes the link down for good: the backend failed.
func (d *Device) lost() { d.changeLink(func() { d.dead = true }) }

func (d *Device) changeLink(change func()) {
	d.mu.Lock()
	before := d.up()
	change()
	d.link.Store(d.up())
	tell := d.configChanged
	if d.up() == before {
		tell = nil
	}
	d.mu.Unlock()
	if tell != nil {
		tell()
	}
}

// Announce makes the network learn where the guest is now, after a migration or a
// restore: by a RARP frame in its name, from which switches learn, and by the guest
// itself where its driver can (virtio 1.2 5.1.6.5.4), which knows its IP addresses.
func (d *Device) Announce() error {
	d.mu.Lock()
	r, tell := d.activation, d.configChanged
	byDriver := r != nil && r.Has(featureStatus|featureCtrlQueue|featureGuestAnnounce)
	d.announce = byDriver
	d.mu.Unlock()
	if r == nil {
		return errors.New("virtio net: no driver to announce")
	}
	r.transmitter.announce.Store(true)
	if r.transmitter.queue != nil {
		r.transmitter.queue.Again()
	}
	if byDriver {
		tell()
	}
	return nil
}

// announced is the driver's word that it has announced itself.
func (d *Device) announced() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.announce = false
}

func (d *Device) setMAC(mac MAC) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.mac = mac
}

// MAC returns the guest's address, which a driver can change.
func (d *Device) MAC() MAC {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.mac
}

// Counters returns what has passed so far.
func (d *Device) Counters() Counters {
	c := &d.counters
	return Counters{
		ReceivedFrames: c.receivedFrames.Load(), ReceivedBytes: c.receivedBytes.Load(), ReceiveDropped: c.receiveDropped.Load(),
		SentFrames: c.sentFrames.Load(), SentBytes: c.sentBytes.Load(), SendDropped: c.sendDropped.Load(),
	}
}
