package balloon

import (
	"fmt"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"

	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

// journal writes down what a holder and the memory's observer hear.
type journal struct {
	mu    sync.Mutex
	lines []string
}

func (j *journal) note(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.lines = append(j.lines, fmt.Sprintf(format, args...))
}

func (j *journal) take() []string {
	j.mu.Lock()
	defer j.mu.Unlock()
	lines := j.lines
	j.lines = nil
	return lines
}

func (j *journal) Hold(r memory.Range) {
	j.note("hold %d+%d", (r.Start-freeStart)/PageSize, r.Size/PageSize)
}
func (j *journal) Release(r memory.Range) {
	j.note("release %d+%d", (r.Start-freeStart)/PageSize, r.Size/PageSize)
}
func (j *journal) ReleaseAll() { j.note("release all") }
func (j *journal) HostWrite(gpa memory.GPA, n uint64) {
	if gpa >= freeStart {
		j.note("discard %d+%d", (gpa-freeStart)/PageSize, n/PageSize)
	}
}

// TestHolder: who keeps holes open hears of pages before they are given back, and
// of those that the guest takes again. Free page reports are not held.
func TestHolder(t *testing.T) {
	var heard journal
	dev, err := New(Config{FreePageReporting: true, Holder: &heard})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	d := virtiotest.NewDriver(t, dev)
	d.Start(^uint64(0), 16)
	d.Machine.Memory.SetObserver(&heard)
	defer d.Machine.Memory.SetObserver(nil)
	var pages []uint32
	for i := range 8 {
		pages = append(pages, mark(t, d, i))
	}
	for _, step := range []struct {
		name string
		do   func()
		want []string
	}{
		{"inflate", func() { d.Queue(inflateQueue).Do([][]byte{numbers(pages[5], pages[0], pages[1])}) },
			[]string{"hold 0+2", "discard 0+2", "hold 5+1", "discard 5+1"}},
		{"report", func() {
			q := d.Queue(reportingQueue)
			head := q.Add(false, virtiotest.Segment{GPA: freeStart + 2*PageSize, Len: PageSize, Write: true})
			q.Kick()
			q.Wait(head)
		}, []string{"discard 2+1"}},
		{"deflate", func() { d.Queue(deflateQueue).Do([][]byte{numbers(pages[1], pages[7])}) },
			[]string{"release 1+1", "release 7+1"}},
		{"reset", d.Reset, []string{"release all"}},
	} {
		step.do()
		if diff := cmp.Diff(step.want, heard.take()); diff != "" {
			t.Errorf("%s, -want +got:\n%s", step.name, diff)
		}
	}
}
