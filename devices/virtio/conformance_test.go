package virtio_test

import (
	"bytes"
	"testing"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
)

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New: func(testing.TB) virtio.Device {
			return &virtiotest.Echo{Sizes: []uint16{64, 256}}
		},
		Drained: []int{0, 1},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			tb.Helper()
			for i := range d.Queues() {
				want := []byte("what was said")
				if got := d.Queue(i).Do([][]byte{want[:4], want[4:]}, 5, 100); !bytes.Equal(got, want) {
					tb.Fatalf("queue %d answers %q", i, got)
				}
			}
		},
		Chain: func(d *virtiotest.Driver, _ int) []virtiotest.Segment {
			return []virtiotest.Segment{
				{GPA: d.Alloc(16, 16), Len: 16},
				{GPA: d.Alloc(16, 16), Len: 16, Write: true},
			}
		},
	})
}
