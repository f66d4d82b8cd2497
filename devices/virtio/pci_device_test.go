package virtio_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"log/slog"
	"strings"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

const allFeatures = ^uint64(0)

func newEcho() *virtiotest.Echo { return &virtiotest.Echo{Sizes: echoSizes()} }

func echoSizes() []uint16 { return []uint16{64, 256} }

func newEchoDevice(testing.TB) virtio.Device { return newEcho() }

// echo passes a message through queue i.
func echo(t *testing.T, d *virtiotest.Driver, i int) {
	t.Helper()
	want := []byte("hello")
	if got := d.Queue(i).Do([][]byte{want}, 16); !bytes.Equal(got, want) {
		t.Fatalf("queue %d answers %q", i, got)
	}
}

func TestCommonRegisters(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	common := func(offset memory.GPA, n int) uint64 { return d.Read(d.Common+offset, n) }
	set := func(offset memory.GPA, n int, v uint64) { d.Write(d.Common+offset, n, v) }

	for word, want := range map[uint64]uint64{0: 1 | 1<<28 | 1<<29, 1: 1, 2: 0, 0xFFFFFFFF: 0} {
		set(0, 4, word)
		if got := common(4, 4); got != want {
			t.Errorf("feature word %d is %#x, want %#x", word, got, want)
		}
	}
	set(8, 4, 5)
	set(12, 4, 0xFFFFFFFF) // no such word
	for word, want := range map[uint64]uint64{0: 0x12345678, 1: 0x9ABCDEF0} {
		set(8, 4, word)
		set(12, 4, want)
		if got := common(12, 4); got != want {
			t.Errorf("driver feature word %d is %#x, want %#x", word, got, want)
		}
	}
	set(22, 2, 1)
	if got := common(24, 2); got != 256 {
		t.Errorf("queue 1 has size %d", got)
	}
	for size, want := range map[uint64]uint64{128: 128, 100: 128, 0: 128, 512: 128} {
		set(24, 2, 128)
		set(24, 2, size)
		if got := common(24, 2); got != want {
			t.Errorf("size %d reads back %d, want %d", size, got, want)
		}
	}
	set(32, 8, 0x1122334455667788)
	set(40, 4, 0xAABBCCDD)
	set(44, 4, 0x01020304)
	if got := common(32, 8); got != 0x1122334455667788 {
		t.Errorf("descriptor table at %#x", got)
	}
	if got := common(40, 8); got != 0x01020304AABBCCDD {
		t.Errorf("driver area at %#x", got)
	}
	set(26, 2, 2)
	if got := common(26, 2); got != 2 {
		t.Errorf("vector %d", got)
	}
	set(26, 2, 3) // there are three: 0 to 2
	if got := common(26, 2); got != 0xFFFF {
		t.Errorf("vector that does not exist reads back %#x", got)
	}
	set(28, 2, 1)
	set(24, 2, 64)
	set(32, 8, 0)
	if common(24, 2) != 128 || common(32, 8) != 0x1122334455667788 {
		t.Error("an enabled queue changed")
	}
	set(22, 2, 7)
	if got := common(24, 2); got != 0 {
		t.Errorf("queue that does not exist has size %d", got)
	}
	set(28, 2, 1)
	if got := common(28, 2); got != 0 {
		t.Error("queue that does not exist is enabled")
	}
	set(18, 2, 9)
	if got := common(18, 2); got != 2 {
		t.Errorf("%d queues", got)
	}
	d.Reset()
	if common(12, 4) != 0 || common(22, 2) != 0 || common(24, 2) != 64 {
		t.Error("registers survive a reset")
	}
}

func TestStatusOrder(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	d.SetStatus(virtio.StatusDriverOK)
	if got := d.Status(); got&virtio.StatusDriverOK != 0 {
		t.Errorf("DRIVER_OK before FEATURES_OK: %#x", got)
	}
	d.Start(allFeatures, 16)
	d.Write(d.Common+20, 1, virtio.StatusAcknowledge) // bits are never taken away
	if got := d.Status(); got&virtio.StatusDriverOK == 0 {
		t.Errorf("status %#x", got)
	}
	d.Write(d.Common+8, 4, 0)
	d.Write(d.Common+12, 4, 0xFFFFFFFF)
	if got := d.Read(d.Common+12, 4); got == 0xFFFFFFFF {
		t.Error("features changed after FEATURES_OK")
	}
	d.SetStatus(virtio.StatusFailed)
	if got := d.Status(); got&virtio.StatusFailed == 0 {
		t.Errorf("status %#x", got)
	}
	echo(t, d, 0)
}

// TestStartFails tells the driver when the VMM cannot start the device.
func TestStartFails(t *testing.T) {
	e := newEcho()
	e.FailStart = errors.New("out of descriptors")
	var log bytes.Buffer
	m := virtiotest.NewMachine(t)
	m.Log = slog.New(slog.NewTextHandler(&log, nil))
	d := m.NewDriver(t, e)
	d.Negotiate(allFeatures)
	d.SetupQueues(16)
	d.SetStatus(virtio.StatusDriverOK)
	if d.Status()&virtio.StatusNeedsReset == 0 {
		t.Error("no reset is asked for")
	}
	if !strings.Contains(log.String(), "out of descriptors") {
		t.Errorf("log: %s", log.String())
	}
	e.FailStart = nil
	d.Start(allFeatures, 16)
	echo(t, d, 0)
}

// TestNotifyThroughBus kicks without doorbells.
func TestNotifyThroughBus(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	d.Start(allFeatures, 16)
	if got := d.Machine.Doorbells.Connected(); got != 2 {
		t.Fatalf("%d doorbells", got)
	}
	for i := range 2 {
		q := d.Queue(i)
		head := q.Submit([][]byte{[]byte("hello")}, 16)
		q.Expose()
		// Past the doorbell, as when KVM has none.
		d.Machine.MMIO.Write(uint64(d.Notify)+uint64(4*i), []byte{byte(i), 0})
		q.Wait(head)
	}
	// No queue, and not the beginning of a register: ignored.
	d.Machine.MMIO.Write(uint64(d.Notify)+8, []byte{2, 0})
	d.Machine.MMIO.Write(uint64(d.Notify)+2, []byte{0, 0})
	echo(t, d, 0)
}

// TestDoorbellsFollowBAR moves the BAR of a running device.
func TestDoorbellsFollowBAR(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	d.Start(allFeatures, 16)
	d.ConfigWrite(0x10, 4, uint64(virtiotest.WindowStart)+0x100000)
	if got := d.Machine.Doorbells.Connected(); got != 2 {
		t.Errorf("%d doorbells after a move", got)
	}
	if d.Machine.Write(d.Notify, []byte{0, 0}) {
		t.Error("the old address still answers")
	}
	d.ConfigWrite(4, 2, 0)
	if got := d.Machine.Doorbells.Connected(); got != 0 {
		t.Errorf("%d doorbells without memory decoding", got)
	}
	d.ConfigWrite(0x10, 4, uint64(virtiotest.WindowStart))
	d.ConfigWrite(4, 2, 6)
	echo(t, d, 0)
}

// TestISR polls the interrupt status, which a read clears.
func TestISR(t *testing.T) {
	e := newEcho()
	d := virtiotest.NewDriver(t, e)
	d.Negotiate(allFeatures)
	d.SetupQueues(16)
	d.SetStatus(virtio.StatusDriverOK)
	echo(t, d, 0)
	if got := d.Read(d.ISR, 1); got&^1 != 0 {
		t.Errorf("ISR %#x after a used buffer", got)
	}
	e.SetConfig(9)
	if got := d.Read(d.ISR, 1); got&2 == 0 {
		t.Errorf("ISR %#x after a change of the configuration", got)
	}
	if got := d.Read(d.ISR, 4); got != 0 {
		t.Errorf("ISR %#x after being read", got)
	}
}

// TestConfigChange checks generation and interrupt.
func TestConfigChange(t *testing.T) {
	e := newEcho()
	d := virtiotest.NewDriver(t, e)
	e.SetConfig(1) // nobody listens yet
	d.Start(allFeatures, 16)
	before := d.Read(d.Common+21, 1)
	e.SetConfig(5)
	if got := d.Read(d.Common+21, 1); got == before {
		t.Error("the generation did not change")
	}
	if got := d.DeviceConfig(0, 1)[0]; got != 5 {
		t.Errorf("configuration reads %d", got)
	}
	if got := d.Machine.MSIs.Count(d.Message(-1)); got != 1 {
		t.Errorf("%d configuration interrupts", got)
	}
}

// TestWindow goes through VIRTIO_PCI_CAP_PCI_CFG (virtio 1.2 4.1.4.9).
func TestWindow(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	at := d.Window
	point := func(bar, offset, n uint64) {
		d.ConfigWrite(at+4, 1, bar)
		d.ConfigWrite(at+8, 4, offset)
		d.ConfigWrite(at+12, 4, n)
	}
	point(0, 18, 2) // num_queues
	if got := d.ConfigRead(at+16, 2); got != 2 {
		t.Errorf("%d queues through the window", got)
	}
	point(0, 20, 1)
	d.ConfigWrite(at+16, 1, virtio.StatusAcknowledge)
	if got := d.Status(); got != virtio.StatusAcknowledge {
		t.Errorf("status %#x after a write through the window", got)
	}
	for _, bad := range []struct{ bar, offset, n uint64 }{
		{1, 20, 1}, {9, 20, 1}, {0, 20, 0}, {0, 20, 3}, {0, 20, 8}, {0, 21, 2}, {0, 0x4000, 1}, {0, 0xFFFFFFFC, 4},
	} {
		point(bad.bar, bad.offset, bad.n)
		d.ConfigWrite(at+16, 4, 0)
		d.ConfigRead(at+16, 4)
		if got := d.Status(); got != virtio.StatusAcknowledge {
			t.Fatalf("window %+v reached the status: %#x", bad, got)
		}
	}
	point(0, 20, 1)
	d.ConfigWrite(at+16, 1, 0)
	if got := d.Status(); got != 0 {
		t.Errorf("status %#x after a reset through the window", got)
	}
	// The whole of a kick, as firmware does it.
	d.Start(allFeatures, 16)
	q := d.Queue(0)
	head := q.Submit([][]byte{[]byte("hello")}, 16)
	q.Expose()
	point(0, 0x3000, 2)
	d.ConfigWrite(at+16, 2, 0)
	q.Wait(head)
}

// TestFaultsAreCounted breaks the protocol many times: all are counted, few
// are logged.
func TestFaultsAreCounted(t *testing.T) {
	var log bytes.Buffer
	m := virtiotest.NewMachine(t)
	m.Log = slog.New(slog.NewTextHandler(&log, nil))
	d := m.NewDriver(t, newEcho())
	const faults = 50
	for range faults {
		d.Reset()
		d.Negotiate(allFeatures)
		d.Write(d.Common+22, 2, 0)
		d.Write(d.Common+32, 8, 1<<40)
		d.Write(d.Common+28, 2, 1)
		d.SetStatus(virtio.StatusDriverOK)
	}
	if got := d.Function.NeedsResets(); got != faults {
		t.Errorf("%d faults counted, want %d", got, faults)
	}
	if got := strings.Count(log.String(), "level=WARN"); got < 1 || got > 3 {
		t.Errorf("%d lines logged:\n%s", got, log.String())
	}
}

// TestNeedsResetInterrupts tells a driver by its configuration interrupt.
func TestNeedsResetInterrupts(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	d.Start(allFeatures, 16)
	arrived := d.Machine.MSIs.Arrived(d.Message(-1))
	d.Queue(0).Offer(999)
	d.Queue(0).Expose()
	d.Queue(0).ForceKick()
	<-arrived
	if d.Status()&virtio.StatusNeedsReset == 0 {
		t.Errorf("status %#x", d.Status())
	}
}

// keeper is a device that keeps what it was started with.
type keeper struct {
	virtiotest.Echo
	kept virtio.Activation
}

func (k *keeper) Start(a virtio.Activation) error {
	k.kept = a
	return k.Echo.Start(a)
}

// TestLateCallbacks ignores what a device reports about a life that is over.
func TestLateCallbacks(t *testing.T) {
	k := &keeper{Echo: virtiotest.Echo{Sizes: echoSizes()}}
	d := virtiotest.NewDriver(t, k)
	d.Start(allFeatures, 16)
	old := k.kept
	d.Reset()
	old.NeedsReset(errors.New("too late"))
	old.ConfigChanged()
	if got := d.Status(); got != 0 {
		t.Errorf("status %#x", got)
	}
	if got := d.Read(d.Common+21, 1); got != 0 {
		t.Errorf("generation %d", got)
	}
	if got := d.Function.NeedsResets(); got != 0 {
		t.Errorf("%d faults counted", got)
	}
}

// TestStateWhileRunning refuses to save what moves.
func TestStateWhileRunning(t *testing.T) {
	d := virtiotest.NewDriver(t, newEcho())
	d.Start(allFeatures, 16)
	if _, err := d.Function.State(); err == nil {
		t.Error("state of a running device")
	}
	d.Function.Pause()
	s, err := d.Function.State()
	if err != nil {
		t.Fatal(err)
	}
	if err := d.Function.SetState(s); err == nil {
		t.Error("state restored into a started device")
	}
}

func TestBadDevices(t *testing.T) {
	m := virtiotest.NewMachine(t)
	for name, sizes := range map[string][]uint16{
		"odd size": {100}, "no size": {0}, "large": {2048}, "many": make([]uint16, 2000),
	} {
		if _, err := virtio.NewPCIDevice(&virtiotest.Echo{Sizes: sizes}, virtio.PCIConfig{Memory: m.Memory, MSIs: m.MSIs, Log: m.Log}); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func FuzzDevice(f *testing.F) { virtiotest.Fuzz(f, newEchoDevice) }

// BenchmarkRoundTrip is a kick, a request and an interrupt, without KVM.
func BenchmarkRoundTrip(b *testing.B) {
	d := virtiotest.NewDriver(b, newEcho())
	d.Start(allFeatures, 64)
	q := d.Queue(0)
	at := d.Alloc(64, 64)
	if err := d.Machine.Memory.WriteAt(binary.LittleEndian.AppendUint64(nil, 7), at); err != nil {
		b.Fatal(err)
	}
	request := []virtiotest.Segment{{GPA: at, Len: 8}, {GPA: at + 32, Len: 8, Write: true}}
	for b.Loop() {
		q.Add(false, request...)
		q.Kick()
		q.WaitAny()
	}
}
