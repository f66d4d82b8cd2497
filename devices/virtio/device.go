package virtio

import (
	"fmt"
	"log/slog"

	"ditto.vm/memory"
)

// ID is a virtio device type (virtio 1.2 5).
type ID uint16

// The device types that ditto offers.
const (
	IDNet     ID = 1
	IDBlock   ID = 2
	IDConsole ID = 3
	IDEntropy ID = 4
	IDBalloon ID = 5
)

var idNames = map[ID]string{
	IDNet: "net", IDBlock: "blk", IDConsole: "console", IDEntropy: "rng", IDBalloon: "balloon",
}

// String returns the short name that logs use.
func (id ID) String() string {
	if name, ok := idNames[id]; ok {
		return name
	}
	return fmt.Sprintf("virtio-%d", uint16(id))
}

// Feature bits that do not belong to one device type (virtio 1.2 6). The
// transport offers those that the queue implements; a [Device] offers only its
// own.
const (
	FeatureIndirectDesc   uint64 = 1 << 28
	FeatureEventIdx       uint64 = 1 << 29
	FeatureVersion1       uint64 = 1 << 32
	FeatureAccessPlatform uint64 = 1 << 33
)

// TransportFeatures are what the transport adds to every device's offer.
const TransportFeatures = FeatureIndirectDesc | FeatureEventIdx | FeatureVersion1

// Device is one virtio device type, apart from how the guest reaches it.
//
// The transport calls Start, Stop, Pause and Resume one at a time. The
// register methods come from vCPU threads, several at once, in any state: they
// take the device's own lock and do not wait for its workers.
type Device interface {
	// ID is the device type.
	ID() ID
	// Features is the device's own part of the offer (bits 0 to 23 and from
	// 50 up). It does not change.
	Features() uint64
	// QueueSizes gives the largest size of each queue, powers of two up to
	// [MaxQueueSize]. It does not change.
	QueueSizes() []uint16
	// ReadConfig fills data from the device configuration at offset. What
	// lies beyond its end reads as zeros.
	ReadConfig(offset uint64, data []byte)
	// WriteConfig changes the device configuration. What cannot be written
	// is ignored.
	WriteConfig(offset uint64, data []byte)
	// Start begins the work on the queues: the driver has set DRIVER_OK, or
	// a saved device is restored. An error is the VMM's fault, not the
	// guest's, and leaves the device stopped.
	Start(a Activation) error
	// Stop ends the work and joins every goroutine that Start began. What
	// is in flight is finished or dropped; after Stop neither queues nor
	// guest memory are touched. It follows Start or Pause.
	Stop()
	// Pause finishes what is in flight, publishes it, and parks: until
	// Resume the device neither reads nor writes guest memory, and every
	// chain that it took has been pushed or rewound.
	Pause()
	// Resume goes on after Pause and looks at every queue once, as if it had
	// been kicked.
	Resume()
}

// Activation is what a started device works with, valid until Stop.
type Activation struct {
	// Features are the negotiated bits, the transport's included.
	Features uint64
	// Queues are indexed as in QueueSizes. A queue that the driver did not
	// enable is nil.
	Queues []*Queue
	// Memory is the guest's RAM.
	Memory *memory.Space
	// ConfigChanged tells the driver that the device configuration changed.
	// Call it after the change is visible to ReadConfig, from any goroutine,
	// holding no lock that the register methods take.
	ConfigChanged func()
	// NeedsReset sets DEVICE_NEEDS_RESET: the driver broke the protocol.
	// The queues call it for malformed rings and chains, and a device calls
	// [Queue.Fail], which stops the queue too, for a request that it cannot
	// answer. The log is rate-limited.
	NeedsReset func(reason error)
	// Log carries the device's name.
	Log *slog.Logger
}

// Has reports whether every bit of feature was negotiated.
func (a *Activation) Has(feature uint64) bool { return a.Features&feature == feature }
