package blk

import (
	"fmt"
	"slices"
	"sync"
	"testing"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

// recorder writes down what an observer and the memory's observer hear, among
// the disk's own events.
type recorder struct {
	disk *fakeDisk
	mu   sync.Mutex
	data memory.Range // the buffer whose writes are of interest
}

func describe(io *IO) string {
	n := 0
	for _, b := range io.Buffers {
		n += len(b.Data)
	}
	return fmt.Sprintf("%d+%d note %d", io.Offset, n, io.Note)
}

func (r *recorder) BeforeRead(io *IO) { io.Note = 7; r.disk.note("before read " + describe(io)) }
func (r *recorder) AfterRead(io *IO, err error) {
	r.disk.note(fmt.Sprint("after read ", describe(io), " ", err))
}
func (r *recorder) BeforeWrite(io *IO) { io.Note = 9; r.disk.note("before write " + describe(io)) }
func (r *recorder) AfterWrite(io *IO, err error) {
	r.disk.note(fmt.Sprint("after write ", describe(io), " ", err))
}
func (r *recorder) BeforeErase(offset, n int64) {
	r.disk.note(fmt.Sprintf("before erase %d+%d", offset, n))
}
func (r *recorder) AfterErase(offset, n int64, err error) {
	r.disk.note(fmt.Sprintf("after erase %d+%d %v", offset, n, err))
}
func (r *recorder) Resize(size int64) { r.disk.note(fmt.Sprint("resize ", size)) }

// HostWrite implements memory.WriteObserver.
func (r *recorder) HostWrite(gpa memory.GPA, n uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.data.Contains(gpa, n) {
		r.disk.note(fmt.Sprintf("memory +%d", n))
	}
}

// TestObserverOrder checks the orders on which names rely.
func TestObserverOrder(t *testing.T) {
	for _, c := range []struct {
		name string
		kind uint32
		fail error
		want []string
	}{
		{"read", typeIn, nil, []string{"before read 4096+4096 note 7", "read", "memory +4096", "after read 4096+4096 note 7 <nil>"}},
		{"failed read", typeIn, errDisk, []string{"before read 4096+4096 note 7", "memory +4096", "after read 4096+4096 note 7 the disk has failed"}},
		{"write", typeOut, nil, []string{"before write 4096+4096 note 9", "write", "after write 4096+4096 note 9 <nil>"}},
		{"failed write", typeOut, errDisk, []string{"before write 4096+4096 note 9", "after write 4096+4096 note 9 the disk has failed"}},
		{"discard", typeDiscard, nil, []string{"before erase 4096+4096", "discard", "after erase 4096+4096 <nil>"}},
		{"write-zeroes", typeWriteZeroes, nil, []string{"before erase 4096+4096", "zero", "after erase 4096+4096 <nil>"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := newFakeDisk(1 << 20)
			disk.fail = c.fail
			r := &recorder{disk: disk}
			d := start(t, newDevice(t, disk, func(config *Config) { config.Observer = r }))
			d.Machine.Memory.SetObserver(r)

			q := d.Queue(0)
			data := d.Alloc(4096, 4096)
			r.mu.Lock()
			r.data = memory.Range{Start: data, Size: 4096}
			r.mu.Unlock()
			head := d.Alloc(64, 16)
			if err := d.Machine.Memory.WriteAt(append(header(c.kind, 8), segment(8, 8, 0)...), head); err != nil {
				t.Fatal(err)
			}
			segments := []virtiotest.Segment{{GPA: head, Len: headerSize}, {GPA: data, Len: 4096, Write: c.kind == typeIn}}
			if c.kind == typeDiscard || c.kind == typeWriteZeroes {
				segments = []virtiotest.Segment{{GPA: head, Len: headerSize + segmentSize}}
			}
			segments = append(segments, virtiotest.Segment{GPA: d.Alloc(1, 1), Len: 1, Write: true})
			request := q.Add(false, segments...)
			q.Kick()
			q.Wait(request)
			if got := disk.seen(); !slices.Equal(got, c.want) {
				t.Errorf("order\n%q, want\n%q", got, c.want)
			}
			d.Machine.Memory.SetObserver(nil)
		})
	}
}
