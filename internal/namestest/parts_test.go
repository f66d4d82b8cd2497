package namestest_test

import (
	"encoding/binary"
	"errors"
	"os"
	"testing"

	"ditto.vm/devices/virtio/balloon"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/internal/labtest"
	"ditto.vm/internal/trackertest"
	"ditto.vm/memory"
)

// openMachine makes a vCPU and a tracker of writes on the memory.
func openMachine(t testing.TB, space *memory.Space) *trackertest.Machine {
	t.Helper()
	m, err := trackertest.OpenMachine(trackertest.MachineConfig{Space: space, Tracker: memory.TrackerWPAsync})
	switch {
	case errors.Is(err, memory.ErrUnsupported):
		t.Skipf("%v; try: Linux 6.7 or newer", err)
	case err != nil && os.Getenv(labtest.EnvRequireKVM) == "":
		t.Skipf("%v; try: run as a member of the kvm group on a machine with KVM", err)
	case err != nil:
		t.Fatal(err)
	}
	t.Cleanup(func() { check(t, m.Close()) })
	return m
}

// openTracker makes a tracker of writes alone.
func openTracker(t testing.TB, space *memory.Space) memory.Tracker {
	t.Helper()
	tracker, _, err := memory.OpenTracker(space, memory.TrackerWPAsync, memory.TrackerHost{})
	if errors.Is(err, memory.ErrUnsupported) {
		t.Skipf("%v; try: Linux 6.7 or newer", err)
	}
	check(t, err)
	t.Cleanup(func() { check(t, tracker.Close()) })
	return tracker
}

// balloonDriver gives pages to a balloon, from one goroutine.
type balloonDriver struct {
	*virtiotest.Queue
	mem  *memory.Space
	pfns memory.GPA // the request
	t    testing.TB
}

func newBalloon(t testing.TB, m *virtiotest.Machine) *balloonDriver {
	dev, err := balloon.New(balloon.Config{})
	check(t, err)
	t.Cleanup(func() { check(t, dev.Close()) })
	d := m.NewDriver(t, dev)
	d.Start(0, 16)
	return &balloonDriver{Queue: d.Queue(0), mem: m.Memory, pfns: d.Alloc(page, page), t: t}
}

// take gives n pages from gpa on.
func (b *balloonDriver) take(gpa memory.GPA, n int) {
	var pfns []byte
	for i := range n {
		pfns = binary.LittleEndian.AppendUint32(pfns, uint32(gpa/page)+uint32(i))
	}
	check(b.t, b.mem.WriteAt(pfns, b.pfns))
	head := b.Add(false, virtiotest.Segment{GPA: b.pfns, Len: len(pfns)})
	b.Kick()
	b.Wait(head)
}
