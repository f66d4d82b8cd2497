package virtiotest

import (
	"bytes"
	"testing"

	"go.uber.org/goleak"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/devices/virtio"
)

// Subject is a device type under test.
type Subject struct {
	// New makes a device that owns nothing the test would have to close, or
	// registers the cleanup itself.
	New func(tb testing.TB) virtio.Device
	// Drained lists the queues that the device empties at every kick, whose
	// garbage it therefore notices at once. The others wait for something
	// outside.
	Drained []int
	// Request, if not nil, makes a valid request of a started device and
	// checks the answer.
	Request func(tb testing.TB, d *Driver)
	// Chain returns a valid chain for queue, for requests that are in flight
	// at a pause. Without it a chain of 64 bytes each way is used, which the
	// device may refuse with a status or DEVICE_NEEDS_RESET.
	Chain func(d *Driver, queue int) []Segment
}

const allFeatures = ^uint64(0)

// Conformance holds a device type against what the transport promises to the
// guest and what the VMM expects of a device.
func Conformance(t *testing.T, s Subject) {
	t.Helper()
	for _, test := range []struct {
		name string
		run  func(t *testing.T, s Subject)
	}{
		{"Offer", testOffer},
		{"Refusal", testRefusal},
		{"Request", testRequest},
		{"ConfigBounds", testConfigBounds},
		{"StartStop", testStartStop},
		{"ResetInFlight", testResetInFlight},
		{"PauseInFlight", testPauseInFlight},
		{"Garbage", testGarbage},
		{"QueueOutsideMemory", testQueueOutsideMemory},
		{"SaveRestore", testSaveRestore},
		{"HostileState", testHostileState},
	} {
		t.Run(test.name, func(t *testing.T) {
			// After everything that the test's own cleanups end.
			ignore := goleak.IgnoreCurrent()
			t.Cleanup(func() { goleak.VerifyNone(t, ignore) })
			test.run(t, s)
		})
	}
}

func (s Subject) driver(t *testing.T) *Driver {
	t.Helper()
	return NewDriver(t, s.New(t))
}

func (s Subject) request(t *testing.T, d *Driver) {
	t.Helper()
	if s.Request != nil {
		s.Request(t, d)
	}
}

// fill puts as many chains on queue i as it has descriptors for, up to n.
func (s Subject) fill(d *Driver, i, n int) {
	q := d.Queue(i)
	for range n {
		segments := []Segment{{GPA: d.Alloc(64, 16), Len: 64}, {GPA: d.Alloc(64, 16), Len: 64, Write: true}}
		if s.Chain != nil {
			segments = s.Chain(d, i)
		}
		if len(q.free) < len(segments) {
			break
		}
		q.Add(true, segments...)
	}
	q.Kick()
}

// testOffer checks identity, offer and initial registers.
func testOffer(t *testing.T, s Subject) {
	dev := s.New(t)
	d := NewDriver(t, dev)
	if got, want := d.ConfigRead(2, 2), uint64(0x1040)+uint64(dev.ID()); got != want {
		t.Errorf("PCI device ID %#x, want %#x", got, want)
	}
	offered := d.Offered()
	if want := virtio.TransportFeatures; offered&want != want {
		t.Errorf("offer %#x lacks %#x", offered, want&^offered)
	}
	// Bits 24 to 49 belong to the transport (virtio 1.2 2.2).
	if own := dev.Features(); own&(1<<50-1)&^(1<<24-1) != 0 {
		t.Errorf("device offers reserved bits: %#x", own)
	}
	if got := int(d.Read(d.Common+regNumQueues, 2)); got != len(dev.QueueSizes()) {
		t.Errorf("%d queues, want %d", got, len(dev.QueueSizes()))
	}
	if s := d.Status(); s != 0 {
		t.Errorf("status %#x before the driver came", s)
	}
}

// testRefusal checks that features are not agreed on when they must not be.
func testRefusal(t *testing.T, s Subject) {
	d := s.driver(t)
	offered := d.Offered()
	for _, c := range []struct {
		name     string
		features uint64
	}{
		{"without VERSION_1", offered &^ virtio.FeatureVersion1},
		{"not offered", offered | 1<<63},
		{"nothing", 0},
	} {
		d.Reset()
		if d.Accept(c.features) {
			t.Errorf("features %#x (%s) are accepted", c.features, c.name)
		}
		d.SetStatus(virtio.StatusDriverOK)
		if d.Status()&virtio.StatusDriverOK != 0 {
			t.Errorf("%s: DRIVER_OK without FEATURES_OK", c.name)
		}
	}
	d.Start(allFeatures, 64)
	s.request(t, d)
}

// testRequest makes a request under each way to run the rings.
func testRequest(t *testing.T, s Subject) {
	for _, c := range []struct {
		name     string
		features uint64
	}{
		{"all features", allFeatures},
		{"no EVENT_IDX", allFeatures &^ virtio.FeatureEventIdx},
		{"no INDIRECT_DESC", allFeatures &^ virtio.FeatureIndirectDesc},
		{"neither", allFeatures &^ (virtio.FeatureEventIdx | virtio.FeatureIndirectDesc)},
		{"VERSION_1 alone", virtio.FeatureVersion1},
	} {
		t.Run(c.name, func(t *testing.T) {
			d := s.driver(t)
			d.Start(c.features, 16)
			// More than once around the ring.
			for range 40 {
				s.request(t, d)
			}
		})
	}
	t.Run("polling", func(t *testing.T) {
		d := s.driver(t)
		d.Negotiate(allFeatures)
		d.SetupQueues(16)
		d.SetStatus(virtio.StatusDriverOK)
		s.request(t, d)
	})
}

// testConfigBounds reads and writes the device configuration everywhere.
func testConfigBounds(t *testing.T, s Subject) {
	d := s.driver(t)
	for _, started := range []bool{false, true} {
		if started {
			d.Start(allFeatures, 16)
		}
		for _, offset := range []uint64{0, 1, 7, 60, 63, 250, 1023, 4088} {
			for _, n := range []int{1, 2, 3, 4, 8} {
				got := d.DeviceConfig(offset, n)
				if offset >= 1023 && !bytes.Equal(got, make([]byte, n)) {
					t.Errorf("configuration at %d reads %x, want zeros", offset, got)
				}
			}
		}
		for _, offset := range []uint64{1023, 4080, 4088} {
			for _, n := range []int{1, 2, 3, 4, 8} {
				d.Machine.Write(d.Config+gpa(offset), make([]byte, n))
			}
		}
	}
	s.request(t, d)
}

// testStartStop goes through many lives of the device.
func testStartStop(t *testing.T, s Subject) {
	d := s.driver(t)
	for i := range 20 {
		d.Start(allFeatures, 1<<(i%6+2))
		if i%3 == 0 {
			d.Function.Pause()
			if err := d.Function.Resume(); err != nil {
				t.Fatal(err)
			}
		}
		if i%5 == 0 {
			s.request(t, d)
		}
	}
	d.Reset()
	d.Reset()
}

// testResetInFlight resets under load and starts again.
func testResetInFlight(t *testing.T, s Subject) {
	d := s.driver(t)
	for range 10 {
		d.Start(allFeatures, 64)
		for i := range d.Queues() {
			s.fill(d, i, 32)
		}
		d.Reset()
	}
	d.Start(allFeatures, 64)
	s.request(t, d)
}

// testPauseInFlight pauses under load: everything taken must be given back,
// and nothing may be lost.
func testPauseInFlight(t *testing.T, s Subject) {
	d := s.driver(t)
	d.Start(allFeatures, 64)
	for range 10 {
		for i := range d.Queues() {
			s.fill(d, i, 8)
		}
		d.Function.Pause()
		// State fails when chains are still in flight.
		before, err := d.Function.State()
		if err != nil {
			t.Fatal(err)
		}
		for i := range d.Queues() {
			s.fill(d, i, 8)
		}
		after, err := d.Function.State()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(before, after); diff != "" {
			t.Errorf("device works while paused:\n%s", diff)
		}
		if err := d.Function.Resume(); err != nil {
			t.Fatal(err)
		}
		if s.Chain != nil {
			s.finish(d)
		} else {
			d.Start(allFeatures, 64)
		}
	}
	d.Start(allFeatures, 64)
	s.request(t, d)
}

// finish waits for every chain on the drained queues.
func (s Subject) finish(d *Driver) {
	for _, i := range s.Drained {
		q := d.Queue(i)
		for head := range q.chains {
			if q.chains[head].count > 0 && !q.chains[head].done {
				q.Wait(uint16(head))
			}
		}
	}
}

// testSaveRestore carries a device over to another machine with the same
// memory, requests not yet taken included.
func testSaveRestore(t *testing.T, s Subject) {
	d := s.driver(t)
	d.Start(allFeatures, 64)
	s.request(t, d)
	d.Function.Pause()
	saved, err := d.Function.State()
	if err != nil {
		t.Fatal(err)
	}
	for _, i := range s.Drained {
		q := d.Queue(i)
		q.Reap()
		if got := saved.Queues[i]; got.NextAvail != q.nextAvail || got.NextUsed != q.nextUsed {
			t.Errorf("queue %d is saved at %d, %d; the driver is at %d, %d", i, got.NextAvail, got.NextUsed, q.nextAvail, q.nextUsed)
		}
	}
	if s.Chain != nil {
		for _, i := range s.Drained {
			s.fill(d, i, 4) // kicked, and not seen by the paused device
		}
	}

	other := s.driver(t)
	copyMemory(t, other.Machine, d.Machine)
	if err := other.Function.SetState(saved); err != nil {
		t.Fatal(err)
	}
	again, err := other.Function.State()
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(saved, again); diff != "" {
		t.Errorf("state changed on the way:\n%s", diff)
	}

	other.move(d)
	if err := other.Function.Resume(); err != nil {
		t.Fatal(err)
	}
	for i := range other.Queues() {
		if other.Machine.MSIs.Count(other.Message(i)) == 0 {
			t.Errorf("queue %d was not interrupted after the restore", i)
		}
	}
	if s.Chain != nil {
		s.finish(other)
	}
	s.request(t, other)
}

// copyMemory makes to's memory equal from's.
func copyMemory(t *testing.T, to, from *Machine) {
	t.Helper()
	dst, err := to.Memory.Writable(0, memorySize)
	if err != nil {
		t.Fatal(err)
	}
	src, err := from.Memory.View(0, memorySize)
	if err != nil {
		t.Fatal(err)
	}
	copy(dst, src)
}

// move takes over the driver's own state from a driver of another machine
// whose memory is the same.
func (d *Driver) move(from *Driver) {
	d.Features, d.next = from.Features, from.next
	d.queues = nil
	for _, q := range from.queues {
		moved := &Queue{
			d: d, index: q.index, size: q.size,
			desc: q.desc, avail: q.avail, used: q.used, notify: q.notify,
			free: q.free, chains: q.chains,
			nextAvail: q.nextAvail, kicked: q.kicked, nextUsed: q.nextUsed,
		}
		moved.mem, _ = d.Machine.Memory.Writable(q.desc, uint64(len(q.mem)))
		d.queues = append(d.queues, moved)
	}
}

// testHostileState restores states that no device saved.
func testHostileState(t *testing.T, s Subject) {
	d := s.driver(t)
	d.Start(allFeatures, 64)
	d.Function.Pause()
	for _, c := range []struct {
		name  string
		spoil func(s *virtio.PCIState)
	}{
		{"no queues", func(s *virtio.PCIState) { s.Queues = nil }},
		{"status", func(s *virtio.PCIState) { s.Status |= 0x10 }},
		{"DRIVER_OK alone", func(s *virtio.PCIState) { s.Status = virtio.StatusDriverOK }},
		{"features", func(s *virtio.PCIState) { s.DriverFeatures |= 1 << 63 }},
		{"config vector", func(s *virtio.PCIState) { s.ConfigVector = 0x7FF }},
		{"queue vector", func(s *virtio.PCIState) { s.Queues[0].Vector = 0x7FF }},
		{"queue size", func(s *virtio.PCIState) { s.Queues[0].Size = 3 }},
		{"queue too large", func(s *virtio.PCIState) { s.Queues[0].Size = 0x8000 }},
		{"queue outside memory", func(s *virtio.PCIState) { s.Queues[0].Desc = 1 << 40 }},
		{"queue wraps", func(s *virtio.PCIState) { s.Queues[0].Used = ^gpa(0) &^ 3 }},
		{"in flight", func(s *virtio.PCIState) { s.Queues[0].NextAvail += 0x7000 }},
		{"identity", func(s *virtio.PCIState) { s.Endpoint.Config[2] ^= 1 }},
		{"no MSI-X", func(s *virtio.PCIState) { s.Endpoint.MSIX = nil }},
		{"short MSI-X", func(s *virtio.PCIState) { s.Endpoint.MSIX.Table = s.Endpoint.MSIX.Table[1:] }},
	} {
		bad, err := d.Function.State()
		if err != nil {
			t.Fatal(err)
		}
		c.spoil(&bad)
		other := s.driver(t)
		if err := other.Function.SetState(bad); err == nil {
			t.Errorf("%s: accepted", c.name)
		}
		other.Start(allFeatures, 64)
	}
}
