package balloon

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"

	"ditto.vm/devices/virtio"
	"ditto.vm/devices/virtio/virtiotest"
	"ditto.vm/memory"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func newDevice(tb testing.TB) *Device {
	tb.Helper()
	d, err := New(Config{DeflateOnOOM: true, FreePageReporting: true})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() {
		if err := d.Close(); err != nil {
			tb.Error(err)
		}
	})
	return d
}

func started(tb testing.TB) (*Device, *virtiotest.Driver) {
	tb.Helper()
	dev := newDevice(tb)
	d := virtiotest.NewDriver(tb, dev)
	d.Start(^uint64(0), 16)
	return dev, d
}

// numbers encodes page numbers as the driver sends them.
func numbers(pages ...uint32) []byte {
	var p []byte
	for _, n := range pages {
		p = binary.LittleEndian.AppendUint32(p, n)
	}
	return p
}

// observed collects what the memory's observer hears outside the driver's
// rings and buffers, which lie below freeStart.
type observed struct {
	mu     sync.Mutex
	ranges []memory.Range
}

// freeStart is where the tests' own pages begin.
const freeStart = memory.GPA(48 << 20)

func (o *observed) HostWrite(gpa memory.GPA, n uint64) {
	if gpa < freeStart {
		return
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.ranges = append(o.ranges, memory.Range{Start: gpa, Size: n})
}

func (o *observed) take() []memory.Range {
	o.mu.Lock()
	defer o.mu.Unlock()
	r := o.ranges
	o.ranges = nil
	return r
}

// mark writes to a page and returns its number.
func mark(tb testing.TB, d *virtiotest.Driver, i int) uint32 {
	tb.Helper()
	at := freeStart + memory.GPA(i)*PageSize
	page, err := d.Machine.Memory.Writable(at, PageSize)
	if err != nil {
		tb.Fatal(err)
	}
	for i := range page {
		page[i] = 0xA5
	}
	return uint32(at / PageSize)
}

func zero(tb testing.TB, d *virtiotest.Driver, page uint32) bool {
	tb.Helper()
	p, err := d.Machine.Memory.View(memory.GPA(page)*PageSize, PageSize)
	if err != nil {
		tb.Fatal(err)
	}
	return bytes.Equal(p, make([]byte, PageSize))
}

func TestConformance(t *testing.T) {
	virtiotest.Conformance(t, virtiotest.Subject{
		New:     func(tb testing.TB) virtio.Device { return newDevice(tb) },
		Drained: []int{inflateQueue, deflateQueue, oldReportingQueue, reportingQueue},
		Request: func(tb testing.TB, d *virtiotest.Driver) {
			page := mark(tb, d, 0)
			d.Queue(inflateQueue).Do([][]byte{numbers(page)})
			if !zero(tb, d, page) {
				tb.Error("the page keeps its bytes in the balloon")
			}
			d.Queue(deflateQueue).Do([][]byte{numbers(page)})
		},
		Chain: func(d *virtiotest.Driver, queue int) []virtiotest.Segment {
			switch queue {
			case oldReportingQueue, reportingQueue:
				return []virtiotest.Segment{{GPA: freeStart, Len: 2 << 20, Write: true}}
			case statsQueue:
				return []virtiotest.Segment{{GPA: d.Alloc(40, 16), Len: 40}}
			}
			at := d.Alloc(64, 16)
			p, _ := d.Machine.Memory.Writable(at, 64)
			for i := range 16 {
				binary.LittleEndian.PutUint32(p[4*i:], uint32(freeStart/PageSize)+uint32(i))
			}
			return []virtiotest.Segment{{GPA: at, Len: 64}}
		},
	})
}

func TestInflate(t *testing.T) {
	dev, d := started(t)
	var o observed
	d.Machine.Memory.SetObserver(&o)
	defer d.Machine.Memory.SetObserver(nil)
	var pages []uint32
	for i := range 16 {
		pages = append(pages, mark(t, d, i))
	}
	// Out of order, with a gap at 3 and 8, and one page twice.
	d.Queue(inflateQueue).Do([][]byte{
		numbers(pages[2], pages[1], pages[0], pages[7]),
		numbers(pages[6], pages[5], pages[4], pages[5]),
	})
	for i, page := range pages {
		if want := i <= 7 && i != 3; zero(t, d, page) != want {
			t.Errorf("page %d: zero is %t, want %t", i, !want, want)
		}
	}
	want := []memory.Range{{Start: freeStart, Size: 3 * PageSize}, {Start: freeStart + 4*PageSize, Size: 4 * PageSize}}
	if diff := cmp.Diff(want, o.take()); diff != "" {
		t.Errorf("the observer heard of other ranges (-want +got)\n%s", diff)
	}
	if got := dev.Reclaimed(); got != 7*PageSize {
		t.Errorf("%d bytes reclaimed, want %d", got, 7*PageSize)
	}
}

func TestReport(t *testing.T) {
	for _, queue := range []int{oldReportingQueue, reportingQueue} {
		dev, d := started(t)
		var o observed
		d.Machine.Memory.SetObserver(&o)
		page := mark(t, d, 0)
		q := d.Queue(queue)
		q.Wait(func() uint16 {
			head := q.Add(true, virtiotest.Segment{GPA: freeStart, Len: 4 << 20, Write: true}, virtiotest.Segment{GPA: freeStart + 8<<20, Len: 2 << 20, Write: true})
			q.Kick()
			return head
		}())
		if !zero(t, d, page) {
			t.Errorf("queue %d: the reported page keeps its bytes", queue)
		}
		want := []memory.Range{{Start: freeStart, Size: 4 << 20}, {Start: freeStart + 8<<20, Size: 2 << 20}}
		if diff := cmp.Diff(want, o.take()); diff != "" {
			t.Errorf("queue %d: the observer heard of other ranges (-want +got)\n%s", queue, diff)
		}
		if got := dev.Reclaimed(); got != 6<<20 {
			t.Errorf("%d bytes reclaimed, want %d", got, 6<<20)
		}
		d.Machine.Memory.SetObserver(nil)
	}
}

// TestLargeReport: Linux reports more at once than other devices' chains may
// hold.
func TestLargeReport(t *testing.T) {
	_, d := started(t)
	q := d.Queue(reportingQueue)
	var segments []virtiotest.Segment
	for range 32 {
		segments = append(segments, virtiotest.Segment{GPA: freeStart, Len: 4 << 20, Write: true})
	}
	head := q.Add(true, segments...)
	q.Kick()
	q.Wait(head)
	if d.Status()&virtio.StatusNeedsReset != 0 {
		t.Error("128 MiB in one report are refused")
	}
}

func TestTarget(t *testing.T) {
	dev, d := started(t)
	config := d.Message(-1)
	before := d.Machine.MSIs.Count(config)
	dev.SetTarget(10*PageSize + 5)
	if got := binary.LittleEndian.Uint32(d.DeviceConfig(configNumPages, 4)); got != 10 {
		t.Errorf("the driver is asked for %d pages, want 10", got)
	}
	if n := d.Machine.MSIs.Count(config) - before; n != 1 {
		t.Errorf("%d configuration interrupts, want 1", n)
	}
	d.Write(d.Config+configActual, 4, 7)
	if got := dev.Actual(); got != 7*PageSize {
		t.Errorf("%d bytes in the balloon, want 7 pages", got)
	}
	d.Write(d.Config+configNumPages, 4, 99)
	if got := dev.Target(); got != 10*PageSize {
		t.Errorf("the driver changed the target to %d", got)
	}
	d.Reset()
	if dev.Actual() != 0 || dev.Target() != 10*PageSize {
		t.Errorf("after a reset %d bytes are in the balloon and %d wanted", dev.Actual(), dev.Target())
	}
}

// stat encodes one entry as the driver sends it.
func stat(tag Stat, value uint64) []byte {
	return binary.LittleEndian.AppendUint64(binary.LittleEndian.AppendUint16(nil, uint16(tag)), value)
}

func TestStats(t *testing.T) {
	dev, d := started(t)
	if s := dev.Stats(); !s.At.IsZero() {
		t.Errorf("statistics before there were any: %+v", s)
	}
	q := d.Queue(statsQueue)
	first := q.Submit([][]byte{stat(StatFree, 1000), stat(StatTotal, 2000), stat(77, 3)})
	q.Kick()
	if err := dev.SetStatsInterval(time.Millisecond); err != nil {
		t.Fatal(err)
	}
	q.Wait(first) // the device asks again
	s := dev.Stats()
	for tag, want := range map[Stat]uint64{StatFree: 1000, StatTotal: 2000} {
		if got, ok := s.Get(tag); !ok || got != want {
			t.Errorf("statistic %d is %d, %t, want %d", tag, got, ok, want)
		}
	}
	if _, ok := s.Get(StatSwapIn); ok || s.At.IsZero() {
		t.Errorf("statistics %+v", s)
	}
	q.Do([][]byte{stat(StatFree, 1)})
	// A pause gives the buffer back, so that nothing is in flight.
	if err := dev.SetStatsInterval(0); err != nil {
		t.Fatal(err)
	}
	held := q.Submit([][]byte{stat(StatFree, 7)})
	q.Kick()
	d.Function.Pause()
	q.Wait(held)
}

func TestMalformed(t *testing.T) {
	for _, test := range []struct {
		name  string
		queue int
		out   [][]byte
		in    []int
	}{
		{"page outside memory", inflateQueue, [][]byte{numbers(1 << 30)}, nil},
		{"last page there is", inflateQueue, [][]byte{numbers(0xFFFFFFFF)}, nil},
		{"cut page number", inflateQueue, [][]byte{{1, 2, 3}}, nil},
		{"too many pages", inflateQueue, [][]byte{make([]byte, 4*maxPages+4)}, nil},
		{"inflate with an answer", inflateQueue, [][]byte{numbers(1)}, []int{4}},
		{"deflate with an answer", deflateQueue, nil, []int{4}},
		{"readable report", reportingQueue, [][]byte{make([]byte, 4096)}, nil},
	} {
		t.Run(test.name, func(t *testing.T) {
			_, d := started(t)
			d.Queue(test.queue).Do(test.out, test.in...)
			if d.Status()&virtio.StatusNeedsReset == 0 {
				t.Error("the driver's fault was not reported")
			}
		})
	}
}

func TestState(t *testing.T) {
	dev := newDevice(t)
	dev.SetTarget(100 * PageSize)
	want := State{TargetPages: 100, ActualPages: 42, StatsInterval: time.Minute}
	if err := dev.SetState(want); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, dev.State()); diff != "" {
		t.Error(diff)
	}
	for _, bad := range []State{{StatsInterval: -1}, {StatsInterval: 25 * time.Hour}} {
		if err := dev.SetState(bad); !errors.Is(err, ErrState) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestAllocations(t *testing.T) {
	raw := numbers(5, 4, 3, 9, 8, 1)
	pages := make([]uint32, 0, maxPages)
	if n := testing.AllocsPerRun(100, func() {
		for p := sortPages(pages, raw); len(p) > 0; {
			_, p = nextRun(p)
		}
		_ = parseStats(raw)
	}); n != 0 {
		t.Errorf("%v allocations a request", n)
	}
}

// FuzzPages: the runs name exactly the pages that were sent.
func FuzzPages(f *testing.F) {
	f.Add(numbers(3, 2, 1, 9))
	f.Add(numbers(0xFFFFFFFF, 0, 0xFFFFFFFE, 0))
	f.Add([]byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, p []byte) {
		want := map[uint32]bool{}
		for i := 0; i+4 <= len(p); i += 4 {
			want[binary.LittleEndian.Uint32(p[i:])] = true
		}
		end := memory.GPA(0)
		for pages := sortPages(nil, p); len(pages) > 0; {
			var run memory.Range
			run, pages = nextRun(pages)
			if run.Start < end {
				t.Fatalf("run at %s overlaps or precedes the one before", run.Start)
			}
			end = run.End()
			for gpa := run.Start; gpa < end; gpa += PageSize {
				n := uint32(gpa / PageSize)
				if !want[n] {
					t.Fatalf("page %d was not sent", n)
				}
				delete(want, n)
			}
		}
		if len(want) > 0 {
			t.Fatalf("pages are missing: %v", want)
		}
	})
}

func FuzzStats(f *testing.F) {
	f.Add(append(stat(StatFree, 1), stat(99, 2)...))
	f.Fuzz(func(t *testing.T, p []byte) {
		s := parseStats(p)
		for tag := range numStats {
			if _, ok := s.Get(tag); ok && !bytes.Contains(p, binary.LittleEndian.AppendUint16(nil, uint16(tag))) {
				t.Fatalf("statistic %d came from nowhere", tag)
			}
		}
	})
}

func FuzzDevice(f *testing.F) {
	virtiotest.Fuzz(f, func(tb testing.TB) virtio.Device { return newDevice(tb) })
}
