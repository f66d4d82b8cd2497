package virtio

import (
	"encoding/binary"

	"ditto.vm/memory"
)

// Device status bits (virtio 1.2 2.1).
const (
	StatusAcknowledge = 1
	StatusDriver      = 2
	StatusDriverOK    = 4
	StatusFeaturesOK  = 8
	StatusNeedsReset  = 64
	StatusFailed      = 128

	statusDriverBits = StatusAcknowledge | StatusDriver | StatusDriverOK | StatusFeaturesOK | StatusFailed
)

// Offsets in struct virtio_pci_common_cfg (virtio 1.2 4.1.4.3).
const (
	commonDeviceFeatureSelect = 0
	commonDeviceFeature       = 4
	commonDriverFeatureSelect = 8
	commonDriverFeature       = 12
	commonConfigVector        = 16
	commonNumQueues           = 18
	commonStatus              = 20
	commonGeneration          = 21
	commonQueueSelect         = 22
	commonQueueSize           = 24
	commonQueueVector         = 26
	commonQueueEnable         = 28
	commonQueueNotifyOff      = 30
	commonQueueDesc           = 32
	commonQueueDriver         = 40
	commonQueueDevice         = 48
	commonSize                = 56
)

// registers are what the driver sees in the common configuration, apart from
// vectors, ISR and generation.
type registers struct {
	status              uint8
	deviceFeatureSelect uint32
	driverFeatureSelect uint32
	driverFeatures      uint64
	queueSelect         uint16
	queues              []queueRegisters
}

type queueRegisters struct {
	QueueConfig
	enabled bool
}

// clearRegisters sets everything to its value after a reset.
//
// Preconditions: mu is held, or nobody else knows d yet.
func (d *PCIDevice) clearRegisters() {
	queues := d.registers.queues
	for i := range queues {
		queues[i] = queueRegisters{QueueConfig: QueueConfig{Size: d.sizes[i]}}
	}
	d.registers = registers{queues: queues}
	for i := range d.vectors {
		d.vectors[i].Store(noVector)
	}
	d.isr.Store(0)
	d.generation.Store(0)
	d.epoch++
}

// readCommon reads a part of the common configuration.
func (d *PCIDevice) readCommon(offset uint64, data []byte) {
	if offset >= commonSize {
		return
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	image := d.commonImage()
	copy(data, image[offset:])
}

// commonImage lays the common configuration out as the driver sees it.
//
// Preconditions: mu is held.
func (d *PCIDevice) commonImage() (image [commonSize]byte) {
	le, r := binary.LittleEndian, &d.registers
	le.PutUint32(image[commonDeviceFeatureSelect:], r.deviceFeatureSelect)
	le.PutUint32(image[commonDeviceFeature:], featureWord(d.offered, r.deviceFeatureSelect))
	le.PutUint32(image[commonDriverFeatureSelect:], r.driverFeatureSelect)
	le.PutUint32(image[commonDriverFeature:], featureWord(r.driverFeatures, r.driverFeatureSelect))
	le.PutUint16(image[commonConfigVector:], uint16(d.vectors[len(d.sizes)].Load()))
	le.PutUint16(image[commonNumQueues:], uint16(len(d.sizes)))
	image[commonStatus] = r.status
	image[commonGeneration] = byte(d.generation.Load())
	le.PutUint16(image[commonQueueSelect:], r.queueSelect)
	if int(r.queueSelect) >= len(r.queues) {
		// Size 0 says that the queue does not exist.
		return image
	}
	q := &r.queues[r.queueSelect]
	le.PutUint16(image[commonQueueSize:], q.Size)
	le.PutUint16(image[commonQueueVector:], uint16(d.vectors[r.queueSelect].Load()))
	if q.enabled {
		image[commonQueueEnable] = 1
	}
	le.PutUint16(image[commonQueueNotifyOff:], r.queueSelect)
	le.PutUint64(image[commonQueueDesc:], uint64(q.Desc))
	le.PutUint64(image[commonQueueDriver:], uint64(q.Avail))
	le.PutUint64(image[commonQueueDevice:], uint64(q.Used))
	return image
}

func featureWord(features uint64, word uint32) uint32 {
	if word > 1 {
		return 0
	}
	return uint32(features >> (32 * word))
}

// commonField is a writable field of the common configuration.
type commonField struct {
	offset, size int
	write        func(d *PCIDevice, value uint64)
}

// commonFields lists the writable fields but the status. Each write runs with
// mu held.
var commonFields = [...]commonField{
	{commonDeviceFeatureSelect, 4, func(d *PCIDevice, v uint64) { d.registers.deviceFeatureSelect = uint32(v) }},
	{commonDriverFeatureSelect, 4, func(d *PCIDevice, v uint64) { d.registers.driverFeatureSelect = uint32(v) }},
	{commonDriverFeature, 4, (*PCIDevice).writeDriverFeature},
	{commonConfigVector, 2, func(d *PCIDevice, v uint64) { d.writeVector(len(d.sizes), v) }},
	{commonQueueSelect, 2, func(d *PCIDevice, v uint64) { d.registers.queueSelect = uint16(v) }},
	{commonQueueSize, 2, (*PCIDevice).writeQueueSize},
	{commonQueueVector, 2, (*PCIDevice).writeQueueVector},
	{commonQueueEnable, 2, (*PCIDevice).writeQueueEnable},
	{commonQueueDesc, 8, func(d *PCIDevice, v uint64) { d.writeAddress(v, func(q *QueueConfig) *memory.GPA { return &q.Desc }) }},
	{commonQueueDriver, 8, func(d *PCIDevice, v uint64) { d.writeAddress(v, func(q *QueueConfig) *memory.GPA { return &q.Avail }) }},
	{commonQueueDevice, 8, func(d *PCIDevice, v uint64) { d.writeAddress(v, func(q *QueueConfig) *memory.GPA { return &q.Used }) }},
}

// writeCommon writes a part of the common configuration, of any offset and
// size. Drivers write one field, or half of a 64-bit one, at a time.
func (d *PCIDevice) writeCommon(offset uint64, data []byte) {
	if offset >= commonSize {
		return
	}
	start, end := int(offset), min(int(offset)+len(data), commonSize)
	d.mu.Lock()
	image := d.commonImage()
	copy(image[start:end], data)
	for _, f := range commonFields {
		if start < f.offset+f.size && f.offset < end {
			var value [8]byte
			copy(value[:f.size], image[f.offset:])
			f.write(d, binary.LittleEndian.Uint64(value[:]))
		}
	}
	d.mu.Unlock()
	// The status last and without mu: it may start or join workers.
	if start <= commonStatus && commonStatus < end {
		d.writeStatus(image[commonStatus])
	}
}

func (d *PCIDevice) writeDriverFeature(value uint64) {
	r := &d.registers
	if r.driverFeatureSelect > 1 || r.status&StatusFeaturesOK != 0 {
		return
	}
	shift := 32 * r.driverFeatureSelect
	r.driverFeatures = r.driverFeatures&^(0xFFFFFFFF<<shift) | value<<shift
}

// selected returns the selected queue while the driver may configure it: it
// exists, is not enabled yet and the device does not run.
func (d *PCIDevice) selected() *queueRegisters {
	r := &d.registers
	if int(r.queueSelect) >= len(r.queues) || r.status&StatusDriverOK != 0 {
		return nil
	}
	if q := &r.queues[r.queueSelect]; !q.enabled {
		return q
	}
	return nil
}

// writeQueueSize shrinks a queue. What is no power of two, or more than the
// device offers, is ignored and reads back as before.
func (d *PCIDevice) writeQueueSize(value uint64) {
	q := d.selected()
	if q == nil || value == 0 || value > uint64(d.sizes[d.registers.queueSelect]) || value&(value-1) != 0 {
		return
	}
	q.Size = uint16(value)
}

func (d *PCIDevice) writeQueueEnable(value uint64) {
	if q := d.selected(); q != nil && value == 1 {
		q.enabled = true
	}
}

func (d *PCIDevice) writeAddress(value uint64, field func(*QueueConfig) *memory.GPA) {
	if q := d.selected(); q != nil {
		*field(&q.QueueConfig) = memory.GPA(value)
	}
}

func (d *PCIDevice) writeQueueVector(value uint64) {
	if i := int(d.registers.queueSelect); i < len(d.registers.queues) {
		d.writeVector(i, value)
	}
}

// writeVector assigns an MSI-X vector; one that does not exist reads back as
// no vector, which tells the driver (virtio 1.2 4.1.5.1.2).
func (d *PCIDevice) writeVector(i int, value uint64) {
	if value >= uint64(d.msix.Vectors()) {
		value = noVector
	}
	d.vectors[i].Store(uint32(value))
}
