// Package pvpanic is the port on which a guest kernel tells that it panicked
// (QEMU docs/specs/pvpanic.rst). Reading the port says which events the device
// knows; writing it reports events.
//
// The device has no state: nothing of it goes into a snapshot.
package pvpanic

import "strings"

// Port is where Linux's driver expects the device by default; the address
// itself comes from the _CRS of the ACPI device QEMU0001.
const Port = 0x505

// Size of the register window in bytes.
const Size = 1

// Event is a set of event bits.
type Event uint8

// The events.
const (
	// Panicked: the guest panicked and stays where it is.
	Panicked Event = 1 << 0
	// CrashLoaded: the guest panicked and boots a crash kernel.
	CrashLoaded Event = 1 << 1
	// Shutdown: the guest shut down without a power-off.
	Shutdown Event = 1 << 2

	all = Panicked | CrashLoaded | Shutdown
)

// String lists the events.
func (e Event) String() string {
	var names []string
	for _, n := range []struct {
		bit  Event
		name string
	}{{Panicked, "panicked"}, {CrashLoaded, "crash-loaded"}, {Shutdown, "shutdown"}} {
		if e&n.bit != 0 {
			names = append(names, n.name)
		}
	}
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, "+")
}

// Device is the port.
type Device struct {
	onEvent func(Event)
}

// New makes the device. onEvent runs on the vCPU thread that wrote the port
// and must not block; it gets only known, non-zero events.
func New(onEvent func(Event)) *Device { return &Device{onEvent: onEvent} }

// ReadRegister implements devices.Handler.
func (d *Device) ReadRegister(_ uint64, data []byte) {
	for i := range data {
		data[i] = byte(all)
	}
}

// WriteRegister implements devices.Handler.
func (d *Device) WriteRegister(_ uint64, data []byte) {
	if len(data) != 1 {
		return
	}
	if event := Event(data[0]) & all; event != 0 {
		d.onEvent(event)
	}
}
